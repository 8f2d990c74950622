"""Target for HTTP: bytes by the fast path, in pieces, get the answers that the plain ASGI way gives them.

An input is a byte that counts the cuts, two bytes for the place of each, and the bytes of a connection: requests that
end at `END`, so that `Content-Length: *` can stand for the length of the body, which is hard to hit by chance. There is
a layer `bn` with two channels.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import AsyncIterator, Iterable
from functools import cache
from itertools import pairwise
from random import Random
from typing import Any

from uvicorn.server import ServerState

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_service.app import INTERFACES
from batchnorm_service.engine.state_dict import state_dict
from batchnorm_service.fast_path.protocol import Protocol
from batchnorm_service.layers import Layers, LayersOptions, records
from batchnorm_service.rest import ApiOptions
from batchnorm_service.rest.application import build_app, build_gateway
from batchnorm_service.server import uvicorn_config
from batchnorm_service.settings import Settings
from batchnorm_service.store.memory import MemoryStore
from fuzz.promises import BrokenPromiseError, same
from fuzz.tensors import raw_all
from simulation.loop import VirtualLoop
from simulation.runtimes import ServiceRuntime

END = b"\xff\xff"
CUTS = 8
SECONDS = 130.0
"""Until every deadline of a connection has passed: that of a request, that of an idle connection, that of a group."""

LIMITS = {"max_body_bytes": 4096, "max_elements": 2048, "read_timeout": 20.0, "write_timeout": 20.0}
_VARYING = re.compile(
    rb'(?<=x-request-id: )[0-9a-f]{32}(?=\r)|(?<="request_id":")[0-9a-f]{32}(?=")'
    rb'|(?<=(?:created|updated)_at":")[^"]*(?=")'
)
_OF_PARSER = b"this is no HTTP request"


class _Transport(asyncio.Transport):
    """A connection of which only the server's side exists."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.sent: list[bytes] = []
        self.closing = False
        self.paused = False

    def write(self, data: Any) -> None:
        if self.closing:
            raise BrokenPromiseError(f"written after the end: {bytes(data)!r}")
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


class _Errors(logging.Handler):
    """Errors in the log: uvicorn and the gateway catch what goes wrong."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(logging.Formatter().format(record))


@contextlib.asynccontextmanager
async def _lifespan(_: Any) -> AsyncIterator[None]:
    yield


@cache
def _app(fast_path: bool) -> Any:
    return build_app(_lifespan, INTERFACES)  # making the routes takes longer than all the rest


def answer_stream(data: bytes) -> None:
    """By the fast path, piece by piece, as by ASGI; and as when all comes at once, where it is HTTP throughout."""
    count = data[0] % (CUTS + 1)
    places = [int.from_bytes(data[at : at + 2], "big") for at in range(1, 1 + 2 * count, 2)]
    stream = whole_stream(data[1 + 2 * count :])
    pieces = cut(stream, places)
    plain = serve(pieces, fast_path=False)
    fast = serve(pieces, fast_path=True)
    before, late, _ = fast[0].rpartition(b"HTTP/1.1 408 ")
    if late and plain[0].startswith(before):  # a body that is not complete may be refused for something else, earlier
        same(fast[1], plain[1], "the layers by the fast path")
    else:
        same(fast, plain, "the answers by the fast path")
    if len(pieces) > 1 and _OF_PARSER not in plain[0]:
        # Of a request that turns out not to be HTTP, more is answered the later that is seen.
        at_once = serve([stream], fast_path=False)
        if _OF_PARSER not in at_once[0]:
            same(plain[0], at_once[0], "the answers to pieces")


def whole_stream(parts: bytes) -> bytes:
    """The requests' bytes, with the lengths of their bodies in place."""
    requests = []
    for part in parts.split(END):
        head, blank, body = part.partition(b"\r\n\r\n")
        requests.append(head.replace(b"Content-Length: *", b"Content-Length: %d" % len(body)) + blank + body)
    return b"".join(requests)


def cut(stream: bytes, places: Iterable[int]) -> list[bytes]:
    """The stream in pieces that begin at these places, none of them empty."""
    ends = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[begin:end] for begin, end in pairwise(ends)]


def serve(pieces: list[bytes], *, fast_path: bool) -> tuple[bytes, Any]:
    """What the service sends, and the layers that it then has."""
    loop = VirtualLoop()
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    random.seed(0)
    try:
        found = loop.run_until_complete(_serve(pieces, fast_path))
    finally:
        logging.getLogger().removeHandler(errors)
        loop.close()
    same((errors.found, unhandled), ([], []), "what went wrong inside")
    return found


async def _serve(pieces: list[bytes], fast_path: bool) -> tuple[bytes, Any]:
    config = _config(fast_path)
    runtime = ServiceRuntime(Random(0))
    store = MemoryStore(runtime=runtime)
    await store.open()
    layers = Layers(store, LayersOptions(), runtime)
    await layers.create("bn", LayerConfig(num_features=2))
    gateway = build_gateway(_app(fast_path), layers, ApiOptions(fast_path=fast_path, **LIMITS))
    state = ServerState()
    state.default_headers = [(b"date", b"today")]
    transport = _Transport()
    config.loaded_app = gateway
    protocol = Protocol(config, state, {}, asyncio.get_running_loop())
    protocol.connection_made(transport)
    for piece in pieces:
        await asyncio.sleep(0.001)  # time passes only while nothing can run
        if transport.paused:  # a real transport reads no further until then
            await asyncio.sleep(SECONDS)
        if transport.closing:
            break
        protocol.data_received(piece)
    await asyncio.sleep(SECONDS)
    same(transport.closing, True, "whether an idle connection is closed")
    protocol.connection_lost(None)
    await asyncio.sleep(SECONDS)
    await layers.close()
    same(
        (len(state.tasks), gateway.running, gateway.transfers.buffered), (0, 0, 0), "what is left: tasks, calls, bytes"
    )
    entries = await store.list("", "", 1000)
    kept = [await store.load(entry.name) for entry in entries]
    states = [(entry.name, record.stamp.version, _tensors(record)) for entry, record in zip(entries, kept, strict=True)]
    return _comparable(b"".join(transport.sent)), states


@cache
def _config(fast_path: bool) -> Any:
    config = uvicorn_config(Settings(), build_gateway(_app(fast_path), Layers(MemoryStore()), ApiOptions()))
    config.load()
    return config


def _tensors(record: Any) -> Any:
    return raw_all(state_dict(records.decode(record).state))


def _comparable(sent: bytes) -> bytes:
    """What was sent, without random ids, times, and the order of headers."""
    text = _VARYING.sub(b"*", sent)
    return re.sub(rb"HTTP/1\.1 \d{3} [^\r]*\r\n(?:[^\r\n]+\r\n)*\r\n", _sorted_head, text)


def _sorted_head(head: re.Match[bytes]) -> bytes:
    status, *lines = head[0].split(b"\r\n")
    return b"\r\n".join([status, *sorted(filter(None, lines)), b"", b""])
