"""Commits in a loop; prints the version and key of each commit that was acknowledged."""

import asyncio
import sys

from batchnorm_service.store.base import Committed
from batchnorm_service.store.sqlite.store import SqliteStore
from store.harness import RECEIPT_SECONDS, after, created, receipt


async def main(path: str) -> None:
    store = SqliteStore(path, RECEIPT_SECONDS)
    await store.open()
    record = await created(store, "a", b"0")
    while True:
        new = after(record, str(record.stamp.version + 1).encode() * 2000)
        key = receipt(new.stamp.version)
        assert await store.commit("a", record.stamp, new, [key]) == Committed()
        print(new.stamp.version, key.key.hex(), flush=True)
        record = new


asyncio.run(main(sys.argv[1]))
