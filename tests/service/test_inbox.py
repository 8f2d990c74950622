"""Large bodies: their rest comes past the parser, and nothing else of the connection changes."""

import asyncio
import contextlib
import gc
import random
import types
import weakref

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from batchnorm_client.contract import SAFETENSORS
from batchnorm_service import direct
from batchnorm_service.inbox import Inbox

from .running import answer, get, post, serving, until

pytestmark = pytest.mark.anyio

PIECE = 1 << 16
EVAL, TRAIN = "/v1/layers/bn/eval", "/v1/layers/bn/train"


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def anyio_backend(request):
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
async def service(anyio_backend, monkeypatch):
    async with serving(monkeypatch) as running:
        yield running


@pytest.fixture
def straight(monkeypatch):
    """How many bytes each inbox took."""
    counts = []
    begin, update = Inbox.__init__, Inbox.buffer_updated

    def begun(self, *arguments):
        counts.append(0)
        begin(self, *arguments)

    def updated(self, count):
        counts[-1] += count
        update(self, count)

    monkeypatch.setattr(Inbox, "__init__", begun)
    monkeypatch.setattr(Inbox, "buffer_updated", updated)
    return counts


def batch(rows):
    return np.random.default_rng(rows).normal(size=(rows, 2)).astype(np.float32)


def request(x, path=EVAL):
    return post(path, save({"input": x}), SAFETENSORS)


def expected(*batches):
    """Torch's output of each batch, and the layer."""
    layer = torch.nn.BatchNorm1d(2)
    return [layer(torch.from_numpy(x)).detach().numpy() for x in batches], layer


@contextlib.asynccontextmanager
async def connection(service):
    """A connection that is closed whatever happens, and given up after a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=1 << 24)
    try:
        async with asyncio.timeout(20):
            yield reader, writer
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("sizes", [[], [1], [300, PIECE], None], ids=["at once", "a byte", "a head", "many"])
async def test_a_large_batch_in_pieces_is_the_same_batch(service, straight, sizes):
    """Followed by a small one in the same bytes, of which the inbox must take none."""
    batches = [batch(100_000), batch(3), batch(70_000)]
    data = b"".join(request(x, TRAIN) for x in batches)
    rng = random.Random(1)
    if sizes is None:
        sizes = [rng.randrange(1, 2 * PIECE) for _ in range(16)]
    async with connection(service) as (reader, writer):
        for size in sizes:
            writer.write(data[:size])
            data = data[size:]
            await writer.drain()
            await asyncio.sleep(0.002)
        writer.write(data)
        outputs, layer = expected(*batches)
        for number, output in enumerate(outputs, 1):
            status, headers, body = await answer(reader)
            assert (status, headers["num-batches-tracked"]) == (200, str(number))
            np.testing.assert_array_equal(load(body)["output"], output)
        assert straight
        assert sum(straight) >= PIECE
        ((_, _, body),) = await service.ask(get("/v1/layers/bn/state", f"Accept: {SAFETENSORS}\r\n"))
        np.testing.assert_array_equal(load(body)["running_mean"], layer.running_mean.numpy())


async def test_a_connection_is_as_it_was_after_each_large_batch(service, straight):
    async with connection(service) as (reader, writer):
        x = batch(200_000)
        for number in range(3):
            for asked in (request(x), get("/v1/layers/bn"), b"x" if number == 2 else get("/healthz"), request(x)):
                writer.write(asked)
                if asked == b"x":
                    assert (await answer(reader))[0] == 400
                    break
                assert (await answer(reader))[0] == 200
        assert len(straight) == 5
        assert await reader.read() == b""


async def test_a_connection_does_not_keep_the_body(service, straight, monkeypatch):
    """uvloop keeps the inbox until it gets another one."""
    bodies = []

    def empty(*arguments):
        made = np.empty(*arguments)
        bodies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(direct, "np", types.SimpleNamespace(empty=empty, uint8=np.uint8))
    async with connection(service) as (reader, writer):
        writer.write(request(batch(200_000)))
        assert (await answer(reader))[0] == 200
        assert len(straight) == len(bodies) == 1

        def gone():
            gc.collect()
            return bodies[0]() is None

        await until(gone)


async def test_what_is_refused_is_refused_when_it_is_complete(service, straight):
    async with connection(service) as (reader, writer):
        writer.write(request(batch(100_000).reshape(-1, 4)) + request(batch(3)))
        assert (await answer(reader))[0] == 422
        assert (await answer(reader))[0] == 200
        assert len(straight) == 1


@pytest.mark.parametrize("abort", [True, False])
async def test_who_leaves_in_the_middle_leaves_no_trace(service, straight, caplog, abort):
    async with connection(service) as (_, writer):
        writer.write(request(batch(200_000), TRAIN)[: 1 << 20])
        await until(lambda: sum(straight) > PIECE)
        assert service.shell._running == 1
        if abort:
            writer.transport.abort()
        else:
            writer.close()
        await until(lambda: not service.state.connections)
        assert service.shell._running == 0
        ((_, headers, _),) = await service.ask(request(batch(3), TRAIN))
        assert headers["num-batches-tracked"] == "1"
        assert caplog.text == ""


async def test_who_says_no_more_in_the_middle_is_hung_up_on(service, straight):
    async with connection(service) as (reader, writer):
        writer.write(request(batch(200_000))[: 1 << 20])
        await until(lambda: sum(straight) > PIECE)
        writer.write_eof()
        assert await reader.read() == b""
        await until(lambda: not service.state.connections)


@pytest.mark.parametrize("rows", [200_000, 1000], ids=["straight", "by the parser"])
async def test_a_server_that_stops_waits_for_the_rest_and_closes(service, straight, rows):
    x = batch(rows)
    sent = request(x, TRAIN)
    async with connection(service) as (reader, writer):
        before = request(batch(50_000))  # one that came straight, almost from its first byte on
        writer.write(before[:300])
        await until(lambda: straight)
        writer.write(before[300:])
        assert (await answer(reader))[0] == 200
        half = len(sent) // 2
        writer.write(sent[:half])
        await until(lambda: service.shell._running == 1 and (rows < PIECE or len(straight) == 2))
        (protocol,) = service.state.connections
        protocol.shutdown()
        writer.write(sent[half:])
        status, headers, body = await answer(reader)
        assert (status, headers["connection"], service.by_asgi) == (200, "close", 1)
        np.testing.assert_array_equal(load(body)["output"], expected(x)[0][0])
        assert await reader.read() == b""


async def test_small_bodies_come_through_the_parser(service, straight):
    async with connection(service) as (reader, writer):
        writer.write(request(batch(4000))[:1000])
        await asyncio.sleep(0.05)
        writer.write(request(batch(4000))[1000:])
        assert (await answer(reader))[0] == 200
        assert not straight
