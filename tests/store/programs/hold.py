"""Opens the store, says so, and holds it until its input ends."""

import asyncio
import sys

from batchnorm_service.store.sqlite.store import SqliteStore


async def main(path: str) -> None:
    store = SqliteStore(path)
    await store.open()
    print("open", flush=True)
    sys.stdin.read()
    await store.close()


asyncio.run(main(sys.argv[1]))
