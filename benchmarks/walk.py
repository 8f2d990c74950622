"""`python -m benchmarks.walk`: one call on 8 KiB, walked through the code: Python calls, files, changes of file.

A reader who follows a call opens so many files and turns from one to another so often. What is counted is every call
of a Python function of the service, and of the client's modules that it shares, in all threads, from the
request's first byte to the answer's last. `--show` prints the walk itself.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import uvloop
from uvicorn.server import ServerState

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_service.app import create_app
from batchnorm_service.fast_path.protocol import Protocol
from batchnorm_service.server import uvicorn_config
from batchnorm_service.settings import Settings
from benchmarks import bodies

_OURS = ("batchnorm_service", "batchnorm_client")
_ENDPOINTS = ("train", "eval")
_WARM = 5


class Walk:
    """The calls of Python functions in files of ours, in order.

    Attributes:
        steps: file and function of each.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[str, str]] = []
        self._recording = False

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        """What `sys.setprofile` calls."""
        if event == "call" and self._recording:
            parts = Path(frame.f_code.co_filename).parts
            ours = [part for part in parts if part in _OURS]
            if ours and not frame.f_code.co_name.startswith("<"):
                self.steps.append(("/".join(parts[parts.index(ours[0]) :]), frame.f_code.co_name))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is called meanwhile."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    @property
    def files(self) -> int:
        """How many files the calls are in."""
        return len({file for file, _ in self.steps})

    @property
    def changes(self) -> int:
        """How often a call is in another file than the one before it."""
        return sum(before[0] != after[0] for before, after in zip(self.steps, self.steps[1:], strict=False))


async def walk(endpoint: str, directory: Path) -> Walk:
    """Send one call over a socket to a server in this process, and record what it does."""
    settings = Settings(store=f"sqlite:///{directory}/layers.db")
    found = Walk()
    threading.setprofile(found)
    sys.setprofile(found)
    shell = create_app(settings)
    async with shell.app.router.lifespan_context(shell.app):
        await shell.app.state.layers.create("bench", LayerConfig(num_features=bodies.CHANNELS))
        config = uvicorn_config(settings, shell, lifespan="off")
        config.load()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Protocol(config, ServerState(), {}, loop), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        request = bodies.call("bench", endpoint, bodies.safetensors(8 * bodies.KIB))
        for _ in range(_WARM):
            await _ask(reader, writer, request)
        with found.recording():
            await _ask(reader, writer, request)
        writer.close()
        server.close()
    sys.setprofile(None)
    return found


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(head.decode())
    await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.walk", description=__doc__)
    parser.add_argument("--show", action="store_true", help="print each call, indented under the file it is in")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for endpoint in _ENDPOINTS:
        with tempfile.TemporaryDirectory() as directory, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(walk(endpoint, Path(directory)))
        print(f"{endpoint}: {len(found.steps)} Python calls in {found.files} files, {found.changes} changes of file")
        last = ""
        for file, function in found.steps if asked.show else ():
            if file != last:
                print(f"  {file}")
            print(f"      {function}")
            last = file


if __name__ == "__main__":
    main()
