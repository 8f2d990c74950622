"""Large bodies on the fast path: in pieces, followed by others, and never complete."""

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

from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_service.rest import bodies as body_module

from .running import answer, get, post, serving, until

pytestmark = pytest.mark.anyio

PIECE = 1 << 16
BAD = b"no request\r\n\r\n"
EVAL, TRAIN = "/v1/layers/bn/eval", "/v1/layers/bn/train"


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def anyio_backend(request):
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
async def service(anyio_backend, monkeypatch):
    async with serving(monkeypatch) as running:
        yield running


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
async def test_a_large_batch_in_pieces_is_the_same_batch(service, sizes):
    """Followed by a small one in the same bytes."""
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
        ((_, _, body),) = await service.ask(get("/v1/layers/bn/state", f"Accept: {SAFETENSORS}\r\n"))
        np.testing.assert_array_equal(load(body)["running_mean"], layer.running_mean.numpy())


async def test_a_connection_is_as_it_was_after_each_large_batch(service):
    async with connection(service) as (reader, writer):
        x = request(batch(200_000))
        for asked, status in [(x, 200), (get("/v1/layers/bn"), 200)] * 3 + [(x, 200), (BAD, 400)]:
            writer.write(asked)
            assert (await answer(reader))[0] == status
        assert await reader.read() == b""


async def test_a_connection_does_not_keep_the_body(service, monkeypatch):
    bodies = []

    def empty(*arguments):
        made = np.empty(*arguments)
        bodies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(body_module, "np", types.SimpleNamespace(empty=empty, uint8=np.uint8))
    async with connection(service) as (reader, writer):
        writer.write(request(batch(200_000)))
        assert (await answer(reader))[0] == 200
        assert len(bodies) == 1

        def gone():
            gc.collect()
            return bodies[0]() is None

        await until(gone)


async def test_what_is_refused_is_refused_when_it_is_complete(service):
    async with connection(service) as (reader, writer):
        writer.write(request(batch(100_000).reshape(-1, 4)) + request(batch(3)))
        assert (await answer(reader))[0] == 422
        assert (await answer(reader))[0] == 200


@pytest.mark.parametrize("abort", [True, False])
async def test_who_leaves_in_the_middle_leaves_no_trace(service, caplog, abort):
    async with connection(service) as (_, writer):
        writer.write(request(batch(200_000), TRAIN)[: 1 << 20])
        await until(lambda: service.gateway.transfers.buffered > 0)
        if abort:
            writer.transport.abort()
        else:
            writer.close()
        await until(lambda: not service.state.connections)
        assert service.gateway.transfers.buffered == 0
        ((_, headers, _),) = await service.ask(request(batch(3), TRAIN))
        assert headers["num-batches-tracked"] == "1"
        assert caplog.text == ""


async def test_who_says_no_more_in_the_middle_is_hung_up_on(service):
    async with connection(service) as (reader, writer):
        writer.write(request(batch(200_000))[: 1 << 20])
        await until(lambda: service.gateway.transfers.buffered > 0)
        writer.write_eof()
        assert await reader.read() == b""
        await until(lambda: not service.state.connections)


@pytest.mark.parametrize("rows", [200_000, 1000])
async def test_a_server_that_stops_waits_for_the_rest_and_closes(service, rows):
    x = batch(rows)
    sent = request(x, TRAIN)
    async with connection(service) as (reader, writer):
        half = len(sent) // 2
        writer.write(sent[:half])
        await until(lambda: service.gateway.transfers.buffered > 0)
        (protocol,) = service.state.connections
        protocol.shutdown()
        writer.write(sent[half:])
        status, headers, body = await answer(reader)
        assert (status, headers["connection"], service.by_asgi) == (200, "close", 1)
        np.testing.assert_array_equal(load(body)["output"], expected(x)[0][0])
        assert await reader.read() == b""
