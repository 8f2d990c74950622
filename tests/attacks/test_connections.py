"""Many connections that do nothing, send slowly, read slowly, or never end."""

import asyncio
from collections import Counter

import pytest

from batchnorm_client.wire.media_types import JSON
from fast_path.running import answer, get, post, until

from .conftest import eval_of

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

BODY = b'{"input": [[1, 2], [3, 5]]}'
CHUNKED = post("/v1/layers/a/eval", b"", JSON).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
PARTS = {
    "heads": b"POST /v1/layers/a/eval HT",
    "bodies": post("/v1/layers/a/eval", BODY, JSON)[:-5],
    "bodies by ASGI": post("/v1/layers/a/eval?statistics=false", BODY, JSON)[:-5],
    "chunks": CHUNKED + b"1b\r\n{",
}


@pytest.mark.timeout(240)
async def test_ten_thousand_idle_connections(anyio_backend, many_files, attacked):
    """At most 16 KiB each; the next caller gets in as soon as they are idle for a second."""
    victim = attacked(BATCHNORM_MAX_CONNECTIONS="10000")
    assert await victim.serves()
    before = victim.memory()
    async with victim.connections(10_000):
        assert victim.memory() - before < 10_000 * 16 * 1024
        await until(victim.serves)
        for _ in range(20):
            assert await victim.serves()
    assert victim.memory() - before < 10_000 * 16 * 1024
    assert await victim.serves()


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
async def test_hundreds_of_slow_senders(anyio_backend, many_files, attacked, part):
    victim = attacked(BATCHNORM_READ_TIMEOUT_SECONDS="2")
    assert await victim.serves()
    before = victim.memory()
    async with victim.connections(500, part) as slow, asyncio.timeout(120):
        assert await victim.serves()
        statuses = Counter([(await answer(reader))[0] for reader, _ in slow])
        assert statuses == {408: 500}
        assert victim.memory() - before < 64 << 20
    assert await victim.serves()


async def test_hundreds_of_slow_readers(anyio_backend, many_files, attacked):
    """Each asks for 4 MiB and reads nothing. All were computed that had come before the limit was reached: 800 MB."""
    limit = 64 << 20
    victim = attacked(
        BATCHNORM_WRITE_TIMEOUT_SECONDS="2",
        BATCHNORM_MAX_BUFFERED_BYTES=str(limit),
        BATCHNORM_MAX_CONCURRENT_REQUESTS="16",
    )
    assert await victim.serves()
    before = victim.memory()
    rows = b"[1, 2]," * 299_999 + b"[1, 2]"
    request = post("/v1/layers/a/eval", b'{"input": [%b]}' % rows, JSON)
    async with victim.connections(1, request) as ((reader, _),):
        assert (await answer(reader))[0] == 200
    once = victim.memory()
    async with victim.connections(200, limit=1 << 10) as slow:
        for _, writer in slow:
            writer.transport.pause_reading()
            writer.write(request)
        peak = 0
        for _ in range(40):
            peak = max(peak, victim.memory())
            await asyncio.sleep(0.1)
        assert peak - max(before, once) < limit + 16 * 4 * (4 << 20), "what is buffered, and what calls take that run"
    await until(victim.serves)


async def test_endless_trailers_headers_and_chunk_extensions(anyio_backend, many_files, attacked):
    """Thousands of parsed headers were kept for each connection that was refused: 240 MB for 100 of them."""
    victim = attacked()
    assert await victim.serves()
    before = victim.memory()
    trailers = CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    header = b"a: b\r\n"
    attacks = [
        (trailers, header),
        (b"GET / HTTP/1.1\r\n", header),
        (b"GET /", b"aaaaaa"),
        (CHUNKED + b"1b;", b"aaaaaa"),
    ]
    for head, more in attacks:
        async with victim.connections(100, head) as endless, asyncio.timeout(60):
            statuses = Counter()
            for reader, writer in endless:
                for _ in range(40):
                    writer.write(more * 10_000)
                statuses[(await answer(reader))[0]] += 1
            assert statuses == {413: 100}
            assert victim.memory() - before < 64 << 20
    assert await victim.serves()


async def test_more_connections_than_allowed(anyio_backend, many_files, attacked):
    victim = attacked(BATCHNORM_MAX_CONNECTIONS="100", BATCHNORM_READ_TIMEOUT_SECONDS="3")
    assert await victim.serves()
    async with victim.connections(100, b"GET / HT"), victim.connections(300, get("/healthz")) as others:
        statuses = Counter()
        for reader, _ in others:
            try:
                statuses[(await answer(reader))[0]] += 1
            except (ConnectionError, asyncio.IncompleteReadError):  # aborted: more than 256 are being refused
                statuses["aborted"] += 1
        assert statuses[503] >= 256
        assert statuses.total() == statuses[503] + statuses["aborted"]
        await until(victim.serves)


@pytest.mark.timeout(240)
async def test_a_flood_of_ten_times_the_capacity(anyio_backend, many_files, attacked):
    """Answers are 200 or 503, memory is bounded, and there is full service within a second after it ends."""
    victim = attacked(BATCHNORM_MAX_CONCURRENT_REQUESTS="100")
    assert await victim.serves()
    before, statuses, stop = victim.memory(), Counter(), asyncio.Event()

    async def flood(reader, writer):
        while not stop.is_set():
            writer.write(eval_of("a", "train"))
            status, headers, _ = await answer(reader)
            statuses[status] += 1
            if status != 200:
                assert headers["retry-after"] == "1"

    async with victim.connections(1000) as callers:
        flooding = [asyncio.ensure_future(flood(*caller)) for caller in callers]
        for _ in range(30):
            await asyncio.sleep(0.1)
            assert await victim.ask(eval_of("b")) == 200
        peak = victim.memory()
        stop.set()
        await asyncio.gather(*flooding)
        async with asyncio.timeout(1):
            assert await victim.serves()
    assert set(statuses) == {200, 503}
    assert peak - before < 64 << 20
