"""Lets the operating system refuse the write that a COMMIT makes, then allows it again; prints what was answered."""

import asyncio
import os
import resource
import sys

from batchnorm_service.store.base import StoreError
from batchnorm_service.store.sqlite.store import SqliteStore
from store.harness import RECEIPT_SECONDS, after, created, receipt


async def main(path: str) -> None:
    store = SqliteStore(path, RECEIPT_SECONDS)
    await store.open()
    records = [await created(store, f"n{n}") for n in range(3)]
    news = [after(record, bytes(100_000)) for record in records]
    keys = [receipt() for _ in records]

    async def commit_all() -> list[object]:
        return await asyncio.gather(
            *(store.commit(f"n{n}", records[n].stamp, news[n], [keys[n]]) for n in range(3)), return_exceptions=True
        )

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(f"{path}-wal").st_size + 5000, hard))
    failed = await commit_all()
    print([isinstance(answer, StoreError) for answer in failed])
    print([await store.load(f"n{n}") == records[n] for n in range(3)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(await commit_all())
    await store.close()


asyncio.run(main(sys.argv[1]))
