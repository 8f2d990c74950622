"""Limits on connections, on idle time, and on what a request has besides its body."""

import asyncio
import contextlib
import json
import resource

import pytest

from batchnorm_client.wire.media_types import JSON
from batchnorm_service import open_files
from batchnorm_service.fast_path import protocol as protocol_module
from batchnorm_service.rest import Connections
from batchnorm_service.rest import connections as connections_module

from .running import answer, get, post, serving, until

pytestmark = pytest.mark.anyio

DOCUMENT = b'{"input": [[1, 2]]}'
LIMITS = {"max_header_bytes": 4096, "max_headers": 20, "max_url_bytes": 512}


def eval_with(headers="", query=""):
    return post(f"/v1/layers/bn/eval{query}", DOCUMENT, JSON, headers)


def chunked(trailers):
    request = post("/v1/layers/bn/eval", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return request + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(DOCUMENT), DOCUMENT, trailers)


def in_chunks(extension):
    """The document, a byte a chunk."""
    chunks = b"".join(b"1%b\r\n%c\r\n" % (extension, byte) for byte in b" " * 300 + DOCUMENT)
    return chunked(b"").replace(b"%x\r\n%b\r\n" % (len(DOCUMENT), DOCUMENT), chunks)


WITHIN = {
    "headers, fast path": eval_with("X-A: b\r\n" * 17),
    "headers, ASGI": get("/v1/layers/bn", "X-A: b\r\n" * 19),
    "bytes": eval_with("X-A: " + "b" * 3900 + "\r\n"),
    "trailers": chunked(b"a: b\r\n" * 17),
    "small chunks": in_chunks(b";a"),
    "URL": get(f"/v1/layers?prefix={'a' * 200}&after={'b' * 200}"),
}
BEYOND = {
    "headers, fast path": (eval_with("X-A: b\r\n" * 18), "HEADERS"),
    "headers, ASGI": (get("/v1/layers/bn", "X-A: b\r\n" * 20), "HEADERS"),
    "bytes": (eval_with("X-A: " + "b" * 4100 + "\r\n"), "HEADER_BYTES"),
    "trailers": (chunked(b"a: b\r\n" * 18), "HEADERS"),
    "bytes of trailers": (chunked(b"a: %b\r\n" % (b"b" * 1000) * 5), "HEADER_BYTES"),
    "path": (get("/" + "a" * 512), "URL_BYTES"),
    "query": (eval_with(query="?a=" + "b" * 500), "URL_BYTES"),
}


@pytest.fixture(autouse=True)
def no_linger(monkeypatch):
    monkeypatch.setattr(protocol_module, "LINGER_SECONDS", 0.05)


@pytest.fixture
def anyio_backend():
    return "asyncio", {"use_uvloop": True}


async def sent_in_pieces(service, request, size):
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    try:
        for begin in range(0, len(request), size):
            writer.write(request[begin : begin + size])
            await asyncio.sleep(0)
        return await answer(reader)
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("size", [1 << 20, 500])
@pytest.mark.parametrize("request_", WITHIN.values(), ids=WITHIN)
async def test_what_is_within_the_limits_is_answered(anyio_backend, monkeypatch, request_, size):
    async with serving(monkeypatch, **LIMITS) as service:
        status, *_ = await sent_in_pieces(service, request_, size)
        assert status == 200


@pytest.mark.parametrize("size", [1 << 20, 500])
@pytest.mark.parametrize(("request_", "setting"), BEYOND.values(), ids=BEYOND)
async def test_what_is_beyond_is_413_and_names_the_setting(anyio_backend, monkeypatch, request_, setting, size):
    async with serving(monkeypatch, **LIMITS) as service:
        status, headers, body = await sent_in_pieces(service, request_, size)
        document = json.loads(body)
        assert (status, headers["connection"], document["type"]) == (413, "close", "/problems/payload-too-large")
        assert document["detail"].endswith(f"BATCHNORM_MAX_{setting} allows")
        assert document["got"] > document["expected"]


async def test_chunk_extensions_count_as_headers(anyio_backend, monkeypatch):
    """Seen: gigabytes of them were read on one connection, for ever."""
    async with serving(monkeypatch, **LIMITS) as service:
        status, headers, body = await sent_in_pieces(service, in_chunks(b";" + b"a" * 50), 500)
        assert (status, headers["connection"]) == (413, "close")
        assert json.loads(body)["detail"].endswith("BATCHNORM_MAX_HEADER_BYTES allows")


@pytest.mark.parametrize("coding", ["gzip, chunked", "deflate,chunked"])
async def test_a_compressed_transfer_is_refused(anyio_backend, monkeypatch, coding):
    """The parser accepts any coding before `chunked`, and the body was read as if it were not compressed."""
    request = chunked(b"").replace(b"Transfer-Encoding: chunked", f"Transfer-Encoding: {coding}".encode())
    async with serving(monkeypatch) as service:
        ((status, _, body),) = await service.ask(request)
        assert (status, json.loads(body)["field"]) == (415, "Transfer-Encoding")


async def test_the_limit_of_connections(anyio_backend, monkeypatch):
    async with serving(monkeypatch, max_connections=3) as service, contextlib.AsyncExitStack() as stack:
        await until(lambda: len(service.gateway.connections) == 0)
        begun = [await connect(stack, service, b"GET / HT") for _ in range(3)]
        await until(lambda: len(service.gateway.connections) == 3)
        reader, _ = await connect(stack, service, get("/healthz"))
        status, headers, body = await answer(reader)
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert json.loads(body)["type"] == "/problems/overloaded"
        assert "BATCHNORM_MAX_CONNECTIONS" in json.loads(body)["detail"]
        assert await reader.read() == b""
        begun[0][1].write(b"TP/1.1\r\nHost: x\r\n\r\n")
        assert (await answer(begun[0][0]))[0] == 200
        begun[1][1].close()
        await until(lambda: len(service.gateway.connections) == 2)
        assert (await service.ask(get("/healthz")))[0][0] == 200


async def test_idle_connections_make_room(anyio_backend, monkeypatch):
    """10,000 connections that ask for nothing would keep everybody out for 75 s."""
    monkeypatch.setattr(connections_module, "MIN_IDLE_SECONDS", 0.05)
    monkeypatch.setattr(connections_module, "_SEARCH_SECONDS", 0.0)
    async with serving(monkeypatch, max_connections=4) as service, contextlib.AsyncExitStack() as stack:
        await until(lambda: len(service.gateway.connections) == 0)
        used, _ = await connect(stack, service, get("/healthz"))
        assert (await answer(used))[0] == 200
        for _ in range(3):
            await connect(stack, service, b"")
        await until(lambda: len(service.gateway.connections) == 4)
        await asyncio.sleep(0.1)
        for _ in range(8):
            assert (await service.ask(get("/healthz")))[0][0] == 200
            assert len(service.gateway.connections) <= 4
        assert await used.read() == b"", "the one that was idle longest was closed first"


def abort(writer):
    writer.transport.abort()


async def connect(stack, service, sent):
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    stack.callback(abort, writer)  # a writer that is forgotten would close its connection
    writer.write(sent)
    return reader, writer


class Idle:
    def __init__(self, since):
        self.idle_since = since
        self.closed = False

    def close_idle(self):
        self.closed = True


def test_those_that_are_idle_longest_go_first():
    pool = Connections(128)
    several = [Idle(100.0 + number) for number in range(128)]
    assert all(pool.add(each, 0.0) is None for each in several)
    assert pool.add(Idle(300.0), 300.0) is None
    closed = [each for each in several if each.closed]
    assert closed == several[:3], "a 64th of them and one"
    assert pool.add(Idle(300.0), 300.0) is None
    assert pool.add(Idle(300.0), 300.0) is None
    assert pool.add(Idle(300.0), 300.0).status == 503, "no search for a while"
    for each in closed:
        pool.remove(each)
    assert len(pool) == 128
    assert pool.add(Idle(301.0), 301.0) is None


def test_connections_in_use_are_not_closed():
    pool = Connections(2)
    several = [Idle(float("inf")), Idle(99.5)]
    assert all(pool.add(each, 0.0) is None for each in several)
    assert pool.add(Idle(100.0), 100.0).status == 503
    assert not any(each.closed for each in several)


def test_when_many_are_being_refused_further_ones_are_aborted():
    pool = Connections(1)
    pool.add(Idle(float("inf")), 0.0)
    refused = [Idle(0.0) for _ in range(257)]
    for each in refused:
        assert not pool.many_refused
        pool.add(each, 0.0)
    assert pool.many_refused
    pool.remove(refused[0])
    assert not pool.many_refused
    assert len(pool) == 1


async def test_the_keep_alive_setting(anyio_backend, monkeypatch):
    async with serving(monkeypatch, keep_alive_seconds=0.2) as service, contextlib.AsyncExitStack() as stack:
        reader, _ = await connect(stack, service, get("/healthz"))
        assert (await answer(reader))[0] == 200
        async with asyncio.timeout(20):
            assert await reader.read() == b""


@pytest.mark.parametrize(
    ("soft", "wanted", "possible"),
    [(20_000, 10_000, 10_000), (4096, 10_000, 3584), (100, 10_000, 64), (resource.RLIM_INFINITY, 10_000, 10_000)],
)
def test_connections_stay_within_the_open_files(monkeypatch, soft, wanted, possible):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert open_files.possible_connections(wanted) == possible


async def test_the_setting_for_features(anyio_backend, monkeypatch):
    async with serving(monkeypatch, max_features=8) as service:
        create = post("/v1/layers/large", b'{"num_features": 9}').replace(b"POST", b"PUT", 1)
        ((status, _, body),) = await service.ask(create)
        document = json.loads(body)
        assert (status, document["field"], document["expected"], document["got"]) == (422, "num_features", 8, 9)
        ((status, *_),) = await service.ask(create.replace(b"9}", b"8}"))
        assert status == 201
