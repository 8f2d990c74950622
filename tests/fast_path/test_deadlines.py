"""Slow senders and slow readers: they cost bounded time and memory, and never another caller's call."""

import asyncio
import contextlib
import json
import socket

import numpy as np
import pytest
from safetensors.numpy import load, save

from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_service.fast_path import protocol
from batchnorm_service.fast_path.deadlines import MIN_BYTES_PER_SECOND, TransferProgress

from .running import answer, get, post, serving, until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ASGI = "Connection: TE\r\n"  # a header that the fast path leaves to ASGI
EVAL, SHARD = "/v1/layers/bn/eval", "/v1/layers/bm/train?group=g&size=2"
SMALL = save({"input": np.ones((3, 2), np.float32)})
LARGE = save({"input": np.ones((1 << 20, 2), np.float32)})  # 8 MiB: more than the kernel's buffers take
SHORT = 0.3


@pytest.fixture(autouse=True)
def short_linger(monkeypatch):
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.1)


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def anyio_backend(request):
    return "asyncio", {"use_uvloop": request.param}


@contextlib.asynccontextmanager
async def connection(service, receive_buffer=None):
    """A connection that is closed whatever happens, and given up after a while."""
    with socket.socket() as sock:
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", service.port))
        # A stream reader takes in up to twice its limit from the kernel by itself.
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 15)
        try:
            async with asyncio.timeout(40):
                yield reader, writer
        finally:
            writer.transport.abort()


async def late(service):
    """Until a request that began now has been given up, which shows that the deadline has passed for others too."""
    async with connection(service) as (reader, writer):
        writer.write(b"GET")
        assert (await answer(reader))[0] == 408


# The arithmetic, with a clock of its own.


def looks(progress, counts, seconds=1.0):
    """After how many seconds a transfer is too slow, or None; the first look is at 0 seconds."""
    for number, count in enumerate(counts):
        if progress.is_too_slow(count, seconds):
            return number * seconds
    return None


def test_a_transfer_without_a_byte_is_too_slow_after_the_timeout():
    many = 1 << 20
    assert looks(TransferProgress(30), [many] * 100) == 30
    assert looks(TransferProgress(30), [many] * 20 + [many + 1] * 100) == 50  # the byte was seen at 20 seconds
    assert looks(TransferProgress(0.5), [many] * 100, seconds=0.125) == 0.5


def test_a_transfer_that_trickles_is_too_slow_once_the_timeout_has_passed():
    assert looks(TransferProgress(30), range(1, 100)) == 30
    assert looks(TransferProgress(30), range(0, 100 * MIN_BYTES_PER_SECOND, MIN_BYTES_PER_SECOND)) is None
    assert looks(TransferProgress(30), range(0, 100 * MIN_BYTES_PER_SECOND, MIN_BYTES_PER_SECOND - 1)) == 30


def test_the_rate_is_that_of_the_whole_transfer():
    begun = 60 * MIN_BYTES_PER_SECOND
    assert looks(TransferProgress(30), range(begun, begun + 1000)) == 61  # 60 KiB + 61 bytes in 61 s
    assert looks(TransferProgress(30, start=begun), range(begun, begun + 1000)) == 30


def test_pauses_of_the_server_do_not_count():
    progress = TransferProgress(30)
    assert looks(progress, [0] * 1000, seconds=0.0) is None
    assert looks(progress, [0] * 1000) == 29  # the look before was the first


# Requests that do not come whole.

CHUNKED = post(EVAL, b"", JSON).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
UNFINISHED = {
    "a method": b"PO",
    "a head": get(EVAL)[:-2],
    "no body": post(EVAL, SMALL, SAFETENSORS)[: -len(SMALL)],
    "half a body": post(EVAL, SMALL, SAFETENSORS)[:-1],
    "half a body by ASGI": post(EVAL, SMALL, SAFETENSORS, ASGI)[:-1],
    "half a large body": post(EVAL, LARGE, SAFETENSORS)[: 3 << 20],
    "half a large body by ASGI": post(EVAL, LARGE, SAFETENSORS, ASGI)[: 3 << 20],
    "half a document": post("/v1/layers/new", b'{"num_features": 2}').replace(b"POST", b"PUT", 1)[:-1],
    "no chunk": CHUNKED,
    "half a chunk": CHUNKED + b"5\r\n12",
    "half a trailer": CHUNKED + b"1\r\n1\r\n0\r\nx: ",
}


@pytest.mark.parametrize("sent", UNFINISHED.values(), ids=UNFINISHED)
async def test_a_request_that_does_not_go_on_gets_408(anyio_backend, monkeypatch, caplog, sent):
    async with serving(monkeypatch, read_timeout_seconds=SHORT) as service, connection(service) as (reader, writer):
        before = get("/v1/layers/bn")
        writer.write(before + sent)
        assert (await answer(reader))[0] == 200
        status, headers, body = await answer(reader)
        assert (status, headers["content-type"], headers["connection"]) == (408, "application/problem+json", "close")
        assert json.loads(body)["type"] == "/problems/request-timeout"
        assert "x-request-id" in headers
        assert await reader.read() == b""
        await until(lambda: not service.state.connections and not service.state.tasks)
        assert service.gateway.transfers.buffered == 0
        assert (await service.ask(get("/v1/layers/new")))[0][0] == 404
    assert caplog.text == ""


@pytest.mark.parametrize("way", ["", ASGI])
async def test_a_request_that_trickles_gets_408(anyio_backend, monkeypatch, way):
    async with serving(monkeypatch, read_timeout_seconds=SHORT) as service, connection(service) as (reader, writer):
        for byte in post(EVAL, SMALL, SAFETENSORS, way):
            with contextlib.suppress(ConnectionError):
                writer.write(bytes([byte]))
            if reader._buffer:
                break
            await asyncio.sleep(SHORT / 20)
        assert (await answer(reader))[0] == 408


@pytest.mark.parametrize("way", ["", ASGI])
async def test_a_request_that_comes_steadily_is_answered_however_long_it_takes(anyio_backend, monkeypatch, way):
    async with serving(monkeypatch, read_timeout_seconds=SHORT) as service, connection(service) as (reader, writer):
        batch = save({"input": np.ones((1 << 12, 2), np.float32)})  # 32 KiB in at least a second
        request = post(EVAL, batch, SAFETENSORS, way)
        for begin in range(0, len(request), 2048):
            writer.write(request[begin : begin + 2048])
            await asyncio.sleep(SHORT / 5)
        assert (await answer(reader))[0] == 200


async def test_who_was_refused_and_goes_on_sending_too_slowly_is_cut(anyio_backend, monkeypatch):
    async with serving(monkeypatch, read_timeout_seconds=SHORT, token="t") as service:
        async with connection(service) as (reader, writer):
            writer.write(post(EVAL, SMALL, SAFETENSORS)[:-1])
            assert (await answer(reader))[0] == 401
            assert await reader.read() == b""  # it was answered already
        async with connection(service) as (reader, writer):
            writer.write(post(EVAL, SMALL, SAFETENSORS)[:-1])
            assert (await answer(reader))[0] == 401
            writer.write(SMALL[-1:] + get("/healthz"))
            assert (await answer(reader))[0] == 200


async def test_a_request_that_the_server_does_not_read_is_not_late(anyio_backend, monkeypatch):
    """It waits behind another one, and is so large that its connection is not read meanwhile."""
    async with serving(monkeypatch, read_timeout_seconds=SHORT) as service, connection(service) as (reader, writer):
        writer.write(post(SHARD, SMALL, SAFETENSORS) + post(EVAL, LARGE, SAFETENSORS, ASGI))
        await until(lambda: service.gateway.running == 1)
        for _ in range(3):
            await late(service)
        assert (await service.ask(post(SHARD, SMALL, SAFETENSORS)))[0][0] == 200
        assert (await answer(reader))[0] == 200
        assert (await answer(reader))[0] == 200


async def test_a_call_that_takes_long_is_not_late(anyio_backend, monkeypatch):
    timeouts = {"read_timeout_seconds": SHORT, "write_timeout_seconds": SHORT}
    async with serving(monkeypatch, **timeouts) as service, connection(service) as (reader, writer):
        writer.write(post(SHARD, SMALL, SAFETENSORS))
        await until(lambda: service.gateway.running == 1)
        for _ in range(3):
            await late(service)
        assert (await service.ask(post(SHARD, SMALL, SAFETENSORS)))[0][0] == 200
        assert (await answer(reader))[0] == 200


@pytest.mark.parametrize("way", ["", ASGI])
async def test_who_never_finishes_a_body_keeps_nobody_out(anyio_backend, monkeypatch, way):
    async with serving(monkeypatch, max_concurrent_requests=2) as service, contextlib.AsyncExitStack() as stack:
        for number in range(5):
            _, writer = await stack.enter_async_context(connection(service))
            writer.write(post(EVAL, SMALL, SAFETENSORS, way)[:-1])
            await until(lambda n=number: len(service.state.connections) == n + 1)
        await until(lambda: way or service.gateway.transfers.buffered == 5 * (len(SMALL) - 1))
        assert (await service.ask(post(EVAL, SMALL, SAFETENSORS, way)))[0][0] == 200
        assert service.gateway.running == 0


# Responses that are not read.

NORMAL = {"fast path": (EVAL, ""), "ASGI": (EVAL, ASGI), "statistics": ("/v1/layers/bn/train?statistics=true", "")}
CLOSING = {"then close": (EVAL, "Connection: close\r\n")}


@pytest.mark.parametrize(("path", "way"), [*NORMAL.values(), *CLOSING.values()], ids=[*NORMAL, *CLOSING])
async def test_a_response_that_nobody_reads_is_dropped(anyio_backend, monkeypatch, caplog, path, way):
    settings = {"write_timeout_seconds": SHORT, "max_buffered_bytes": 1 << 20, "max_concurrent_requests": 1}
    async with serving(monkeypatch, **settings) as service, connection(service, 1 << 14) as (_, writer):
        writer.write(post(path, LARGE, SAFETENSORS, way))
        transfers = service.gateway.transfers
        await until(lambda: transfers.buffered > 1 << 20 and not service.gateway.running)
        ((status, headers, body),) = await service.ask(get("/v1/layers/bn"))
        assert (status, json.loads(body)["type"], headers["retry-after"]) == (503, "/problems/overloaded", "1")
        assert (await service.ask(get("/healthz")))[0][0] == 200
        await until(lambda: not service.state.connections and not service.state.tasks)
        assert transfers.buffered == 0
        assert (await service.ask(get("/v1/layers/bn")))[0][0] == 200
    logged = {record.name for record in caplog.records}
    assert logged <= {"batchnorm_service.requests"}  # the call was slow


@pytest.mark.parametrize(("path", "way"), NORMAL.values(), ids=NORMAL)
async def test_a_response_that_is_read_steadily_is_sent_however_long_it_takes(anyio_backend, monkeypatch, path, way):
    settings = {"write_timeout_seconds": SHORT}
    async with serving(monkeypatch, **settings) as service, connection(service, 1 << 16) as (reader, writer):
        writer.write(post(path, LARGE, SAFETENSORS, way))
        head = await reader.readuntil(b"\r\n\r\n")
        left = int(head.lower().partition(b"content-length: ")[2].split()[0])
        body = []
        while left:
            body.append(await reader.readexactly(min(left, 1 << 18)))
            left -= len(body[-1])
            await asyncio.sleep(SHORT / 10)
        assert load(b"".join(body))["output"].shape == (1 << 20, 2)
        writer.write(get("/healthz"))
        assert (await answer(reader))[0] == 200
        await until(lambda: service.gateway.transfers.buffered == 0)


# Bytes on their way, all connections together.


async def test_what_is_announced_takes_no_room(anyio_backend, monkeypatch):
    async with serving(monkeypatch, max_buffered_bytes=1 << 20) as service, contextlib.AsyncExitStack() as stack:
        head = post(EVAL, SMALL, SAFETENSORS).partition(b"Content-Length")[0] + b"Content-Length: 60000000\r\n\r\n"
        for _ in range(10):
            _, writer = await stack.enter_async_context(connection(service))
            writer.write(head + b"12345")
        await until(lambda: service.gateway.transfers.buffered == 50)
        assert (await service.ask(post(EVAL, SMALL, SAFETENSORS)))[0][0] == 200


@pytest.mark.parametrize("way", ["", ASGI])
async def test_what_has_come_takes_room_until_it_is_complete(anyio_backend, monkeypatch, way):
    async with serving(monkeypatch, max_buffered_bytes=1 << 20) as service, connection(service) as (reader, writer):
        request = post(EVAL, LARGE, SAFETENSORS, way)
        writer.write(request[: 2 << 20])
        await until(lambda: service.gateway.transfers.buffered > 1 << 20)
        for path, other in (("", ""), ("", ASGI), ("?statistics=true", ASGI)):
            ((status, headers, body),) = await service.ask(post(EVAL + path, SMALL, SAFETENSORS, other))
            assert (status, json.loads(body)["type"]) == (503, "/problems/overloaded")
            assert headers["retry-after"] == "1"
        writer.write(request[2 << 20 :])
        assert (await answer(reader))[0] == 200
        assert (await service.ask(post(EVAL, SMALL, SAFETENSORS)))[0][0] == 200


@pytest.mark.parametrize("way", ["", ASGI])
async def test_bodies_that_were_let_in_cannot_grow_without_bound(anyio_backend, monkeypatch, way):
    """One largest body beyond the bound, whatever was let in while there was room."""
    settings = {"max_buffered_bytes": 1 << 20, "max_body_bytes": 1 << 20}
    body = LARGE[: 1 << 20]
    async with serving(monkeypatch, **settings) as service, contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(connection(service)) for _ in range(4)]
        for _, writer in callers:
            writer.write(post(EVAL, body, SAFETENSORS, way)[: 1 - len(body)])
        refused = []
        transfers = service.gateway.transfers
        await until(lambda: transfers.buffered == 4)  # all are let in before much of a body has come
        for _, writer in callers:
            writer.write(body[1:-1])

        async def read(reader, writer):
            status, _, problem = await answer(reader)
            assert (status, json.loads(problem)["type"]) == (503, "/problems/overloaded")
            refused.append(writer)

        readers = [asyncio.create_task(read(*caller)) for caller in callers]
        await until(lambda: len(refused) == 2 and transfers.buffered >= 2 * len(body) - (1 << 18))
        assert transfers.buffered <= 2 << 20
        for task in readers:
            task.cancel()
        await asyncio.wait(readers)
        for reader, writer in callers:
            if writer in refused:  # the rest of its body is skipped
                writer.write(body[-1:] + get("/healthz"))
                assert (await answer(reader))[0] == 200


async def test_the_body_of_who_is_refused_is_not_kept(anyio_backend, monkeypatch):
    allocated = []
    empty = np.empty

    def recorded(size, *arguments, **options):
        allocated.append(size)
        return empty(size, *arguments, **options)

    async with serving(monkeypatch, token="t") as service, connection(service) as (reader, writer):
        monkeypatch.setattr(np, "empty", recorded)
        writer.write(post(EVAL, LARGE, SAFETENSORS)[: 4 << 20])
        assert (await answer(reader))[0] == 401
        assert service.gateway.transfers.buffered == 0
        assert allocated == []


# Idle connections.


async def test_a_connection_is_not_idle_when_the_next_request_has_begun(anyio_backend, monkeypatch):
    """Its first bytes came before the answer to the one before it was written."""
    async with serving(monkeypatch) as service, connection(service) as (reader, writer):
        shard, following = post(SHARD, SMALL, SAFETENSORS), get("/v1/layers/bn")
        writer.write(shard + following[:20])
        await until(lambda: service.gateway.running == 1)
        (served,) = service.state.connections
        assert (await service.ask(shard))[0][0] == 200
        assert (await answer(reader))[0] == 200
        served.timeout_keep_alive = 0
        served._check_idle()
        served.timeout_keep_alive = 60
        writer.write(following[20:])
        assert (await answer(reader))[0] == 200


async def test_a_connection_on_which_nothing_is_asked_is_closed(anyio_backend, monkeypatch):
    async with serving(monkeypatch) as service, connection(service) as (reader, _):
        await until(lambda: service.state.connections)
        (served,) = service.state.connections
        assert served._idle_timer is not None
        served.timeout_keep_alive = 0
        served._check_idle()
        assert await reader.read() == b""


async def test_a_connection_is_not_idle_while_its_last_response_is_read(anyio_backend, monkeypatch):
    async with serving(monkeypatch) as service, connection(service, 1 << 14) as (reader, writer):
        writer.write(post(EVAL, LARGE, SAFETENSORS))
        await until(lambda: service.gateway.transfers.buffered)
        (served,) = service.state.connections
        served.timeout_keep_alive = 0
        served._check_idle()
        served.timeout_keep_alive = 60
        assert not served.transport.is_closing()
        assert (await answer(reader))[0] == 200
        writer.write(get("/healthz"))
        assert (await answer(reader))[0] == 200
