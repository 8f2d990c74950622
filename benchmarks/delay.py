"""A way to the store that takes time: what goes through it arrives some milliseconds later, in both directions."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Final

_BYTES: Final = 1 << 16
_PATIENCE: Final = 60.0  # seconds


@contextmanager
def delayed(port: int, seconds: float) -> Iterator[int]:
    """A port that leads to `port` of this machine through a process of its own, which holds everything up."""
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(port, seconds, tell), daemon=True)
    process.start()
    try:
        if not told.poll(_PATIENCE):
            raise RuntimeError("the process in the middle did not start")
        yield told.recv()
    finally:
        process.terminate()
        process.join()


def _serve(port: int, seconds: float, tell: Connection) -> None:
    async def serve() -> None:
        passing: set[asyncio.Future[object]] = set()  # or nothing would hold on to them

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", port)
            both = asyncio.gather(_pass_on(reader, back, seconds), _pass_on(there, writer, seconds))
            passing.add(both)
            both.add_done_callback(passing.discard)
            with contextlib.suppress(ConnectionError):
                await both

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        tell.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Write what is read, that much later, in order; however much is on its way, each piece takes as long."""
    loop = asyncio.get_running_loop()
    while data := await reader.read(_BYTES):
        loop.call_later(seconds, writer.write, data)
    await asyncio.sleep(seconds)
    writer.close()
