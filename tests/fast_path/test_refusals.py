"""Requests that cannot be read: in which order their refusals leave, and what is kept of them before."""

import asyncio
import contextlib
import json

import numpy as np
import pytest
from safetensors.numpy import save

from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_service.fast_path import protocol as protocol_module
from batchnorm_service.rest import RequestLimits
from batchnorm_service.store.memory import MemoryStore

from .running import answer, get, post, serving, until

pytestmark = pytest.mark.anyio

BATCH = save({"input": np.arange(6, dtype=np.float32).reshape(3, 2)})
TRAIN = post("/v1/layers/bn/train", BATCH, SAFETENSORS)
ASGI = post("/v1/layers/bn/train", BATCH, SAFETENSORS, "Connection: TE\r\n")
CHUNKED = post("/v1/layers/bn/eval", b"", JSON).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
DOCUMENT = b'{"input": [[1, 2]]}'
MAX_HEAD_BYTES = RequestLimits().header_bytes
WHOLE = CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(DOCUMENT), DOCUMENT)
"""A chunked request up to its trailers."""

UNREADABLE = {
    "garbage": (b"no request\r\n\r\n", 400),
    "a bad path": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a bad chunk": (CHUNKED + b"no size\r\n", 400),
    "a bad chunk later": (CHUNKED + b"2\r\n{}\r\nno size\r\n", 400),
    "a head without end": (b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 20), 413),
    "trailers without end": (WHOLE + b"x: y\r\n" * (1 << 17), 413),
    "too slow": (b"GET / HT", 408),
}


@pytest.fixture(autouse=True)
def no_linger(monkeypatch):
    monkeypatch.setattr(protocol_module, "LINGER_SECONDS", 0.05)


@pytest.fixture
def anyio_backend():
    return "asyncio", {"use_uvloop": True}


@contextlib.asynccontextmanager
async def connection(service):
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=1 << 20)
    try:
        async with asyncio.timeout(40):
            yield reader, writer
    finally:
        writer.transport.abort()


def connections_of(service, writer):
    """The server's side of a connection."""
    return [each for each in service.state.connections if each.client == writer.get_extra_info("sockname")]


class Commits:
    """Commits of the store that wait until they may go on, at the latest at the end of a block."""

    def __init__(self, monkeypatch):
        self.may_go_on = asyncio.Event()
        self.waiting = 0
        commit = MemoryStore.commit

        async def wait(*arguments):
            self.waiting += 1
            await self.may_go_on.wait()
            return await commit(*arguments)

        monkeypatch.setattr(MemoryStore, "commit", wait)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.may_go_on.set()


BEFORE = {"fast path": [TRAIN], "ASGI": [ASGI], "both": [TRAIN, ASGI], "GET": [get("/healthz"), TRAIN]}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize(("sent", "status"), UNREADABLE.values(), ids=UNREADABLE)
async def test_a_refusal_waits_for_the_answers_to_what_came_before(anyio_backend, monkeypatch, before, sent, status):
    """A 400 for garbage behind a train call was sent before the train call's 200, and taken for its answer."""
    async with serving(monkeypatch, read_timeout_seconds=0.3) as service, connection(service) as (reader, writer):
        await service.ask(post("/v1/layers/bn/eval", BATCH, SAFETENSORS))  # now the layer is in memory
        with Commits(monkeypatch) as commits:
            writer.write(b"".join(before) + sent)
            await until(lambda: commits.waiting)
            if len(before) == 1:  # the server does not read on behind more of them
                (protocol,) = connections_of(service, writer)
                await until(lambda: protocol._refused)
                assert not reader._buffer
        for _ in before:
            assert (await answer(reader))[0] == 200
        got, headers, body = await answer(reader)
        assert (got, headers["connection"], json.loads(body)["status"]) == (status, "close", status)
        assert await reader.read() == b""
        await until(lambda: not service.state.tasks)
    assert service.gateway.transfers.buffered == 0


async def test_a_server_that_stops_answers_what_came_before(anyio_backend, monkeypatch):
    async with serving(monkeypatch) as service, connection(service) as (reader, writer):
        with Commits(monkeypatch) as commits:
            writer.write(TRAIN + b"no request\r\n\r\n")
            await until(lambda: commits.waiting)
            for protocol in list(service.state.connections):
                protocol.shutdown()
        status, headers, _ = await answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await reader.read() == b""


async def test_trailers_are_dropped(anyio_backend, monkeypatch):
    async with serving(monkeypatch) as service, connection(service) as (reader, writer):
        for trailers in (b"", b"x: y\r\n", b"x: y\r\n" * 100, b"authorization: no\r\n"):
            writer.write(WHOLE + trailers + b"\r\n" + get("/healthz"))
            assert (await answer(reader))[0] == 200
            assert (await answer(reader))[0] == 200


@pytest.mark.parametrize("pieces", [1, 40])
@pytest.mark.parametrize(
    "trailers",
    [b"x: y\r\n" * 20_000, b"x: " + b"y" * 400_000, b"x" * 400_000, b"x: " + b"y" * 100_000 + b"\r\n"],
    ids=["many", "a value without end", "a name without end", "long"],
)
async def test_trailers_count_as_headers(anyio_backend, monkeypatch, trailers, pieces):
    async with serving(monkeypatch) as service, connection(service) as (reader, writer):
        writer.write(WHOLE)
        await until(lambda: service.by_asgi)
        size = len(trailers) // pieces
        for begin in range(0, len(trailers), size):
            if reader._buffer:
                break
            with contextlib.suppress(ConnectionError):
                writer.write(trailers[begin : begin + size])
                await writer.drain()
            await asyncio.sleep(0.001)
        status, _, body = await answer(reader)
        assert (status, json.loads(body)["type"]) == (413, "/problems/payload-too-large")


async def test_chunks_are_no_trailers(anyio_backend, monkeypatch):
    """Whatever pieces they come in: here each ends with the size of the next chunk."""
    body = save({"input": np.ones((1 << 15, 2), np.float32)})
    async with serving(monkeypatch) as service, connection(service) as (reader, writer):
        writer.write(CHUNKED.replace(JSON.encode(), SAFETENSORS.encode()))
        writer.write(b"1000\r\n")
        for begin in range(0, len(body) - 0x1000, 0x1000):
            writer.write(body[begin : begin + 0x1000] + b"\r\n1000\r\n")
            await asyncio.sleep(0.001)
        rest = body[begin + 0x1000 :]
        assert len(rest) < 0x1000
        writer.write(rest + bytes(0x1000 - len(rest)) + b"\r\n0\r\n\r\n")
        assert (await answer(reader))[0] == 400  # the file is too long, but it was read whole


async def test_a_large_body_after_a_chunked_one_is_no_trailer(anyio_backend, monkeypatch):
    body = save({"input": np.ones((1 << 18, 2), np.float32)})
    async with serving(monkeypatch) as service, connection(service) as (reader, writer):
        writer.write(WHOLE + b"\r\n")
        assert (await answer(reader))[0] == 200
        request = post("/v1/layers/bn/eval", body, SAFETENSORS)
        for begin in range(0, len(request), 1 << 16):
            writer.write(request[begin : begin + (1 << 16)])
            await asyncio.sleep(0.001)
        assert (await answer(reader))[0] == 200
        assert service.by_asgi == 1


async def test_trailers_of_who_was_refused_are_not_kept(anyio_backend, monkeypatch):
    async with serving(monkeypatch, token="t") as service, connection(service) as (reader, writer):
        writer.write(WHOLE + b"x: y\r\n" * 100)
        assert (await answer(reader))[0] == 401
        (protocol,) = connections_of(service, writer)
        assert len(protocol.scope["headers"]) < 10
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                writer.write(b"x: y\r\n" * 1000)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""  # it was answered, so all that is left is to close
        assert len(protocol.scope["headers"]) < 10


@pytest.mark.parametrize("behind", [b"", get("/healthz")], ids=["alone", "with another behind"])
async def test_an_offer_with_a_target_that_cannot_be_read_is_refused_once(anyio_backend, monkeypatch, behind):
    """The head was read a second time without the offer, refused, and what came behind it was refused again."""
    offer = b"GET http://x HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
    async with serving(monkeypatch) as service, connection(service) as (reader, writer):
        writer.write(offer + behind)
        assert (await answer(reader))[0] == 400
        assert await reader.read() == b""


async def test_a_head_that_is_too_large_is_refused_also_when_it_comes_at_once(anyio_backend, monkeypatch):
    head = get("/healthz", "X-Long: " + "x" * MAX_HEAD_BYTES + "\r\n")
    async with serving(monkeypatch) as service, connection(service) as (reader, writer):
        await until(lambda: connections_of(service, writer))
        connections_of(service, writer)[0].data_received(head)
        assert (await answer(reader))[0] == 413


@pytest.mark.parametrize("length", ["{} ", "{}\t", "00000000000000000000{}"])
async def test_a_content_length_may_have_blanks_and_zeros(anyio_backend, monkeypatch, length):
    request = post("/v1/layers/bn/eval", DOCUMENT)
    given = f"Content-Length: {length.format(len(DOCUMENT))}\r\n".encode()
    request = request.replace(b"Content-Length: %d\r\n" % len(DOCUMENT), given)
    async with serving(monkeypatch) as service, connection(service) as (reader, writer):
        writer.write(request + get("/healthz"))
        assert (await answer(reader))[0] == 200
        assert (await answer(reader))[0] == 200
