"""Adds 1 to the number in record "a" as often as it is told to, in a race with others."""

import asyncio
import sys

from batchnorm_service.store.base import Committed
from batchnorm_service.store.sqlite.store import SqliteStore
from store.harness import RECEIPT_SECONDS, after, loaded, receipt


async def main(path: str, times: int) -> None:
    store = SqliteStore(path, RECEIPT_SECONDS, exclusive=False, busy_seconds=30)
    await store.open()
    for _ in range(times):
        while True:
            record = await loaded(store, "a")
            new = after(record, str(int(record.data) + 1).encode())
            if await store.commit("a", record.stamp, new, [receipt()]) == Committed():
                break
    await store.close()


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
