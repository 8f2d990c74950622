"""Invariant 1 on CUDA: the engine on the device against the engine on the CPU, within stated tolerances.

The kernels sum in another order, so nothing is bit-equal. TOLERANCE bounds |cuda - cpu| by atol + rtol * |cpu|; for
half precision it is one unit in the last place of values around 4, for the rest what sums of a few thousand terms lose.

How the buffers of `engine.staging` are used is tested without a device in `test_staging.py`; here is what needs one.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.engine.gradients import backward_step, gradient_sums, shard_backward
from batchnorm_service.engine.inverse import inverse_step
from batchnorm_service.engine.normalize import (
    eval_statistics,
    eval_step,
    normalize_with,
    output_parameters,
    shard_moments,
    train_step,
)
from batchnorm_service.engine.running_statistics import fold
from batchnorm_service.engine.staging import CudaQueue, Staging, staged
from batchnorm_service.engine.state import initial_state
from batchnorm_service.layers import Layers, LayersOptions
from batchnorm_service.store.memory import MemoryStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 8e-3, "atol": 3.2e-2},
}
SHAPES = [(32, 6), (8, 6, 10), (4, 6, 9, 11), (2, 6, 3, 5, 7)]
STATISTICS = ["moving", "population"]


DEVICE = torch.device("cuda", 0)


def close(cuda, cpu, dtype=None):
    assert cuda.is_cpu
    torch.testing.assert_close(cuda, cpu, **TOLERANCE[dtype or cpu.dtype])


def layer(dtype, statistics="moving", **config):
    state = initial_state(
        LayerConfig(
            num_features=6, dtype="float64" if dtype == torch.float64 else "float32", statistics=statistics, **config
        )
    )
    if state.weight is None or state.bias is None:
        return state
    with torch.no_grad():
        state.weight.copy_(torch.linspace(0.5, 2, 6))
        state.bias.copy_(torch.linspace(-1, 1, 6))
    return state


def batches(shape, dtype, count=3):
    random = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=random, dtype=torch.float64) + 1).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_train_and_eval(shape, dtype, statistics):
    here = there = layer(dtype, statistics)
    for batch in batches(shape, dtype):
        cpu, cuda = train_step(here, batch), train_step(there, batch.cuda())
        assert cuda.output.is_cpu
        assert cuda.moments.mean.is_cpu
        close(cuda.output, cpu.output)
        close(cuda.mean, cpu.mean)
        close(cuda.invstd, cpu.invstd)
        assert cuda.moments.count == cpu.moments.count
        here, there = fold(here, cpu.moments), fold(there, cuda.moments)
        close(there.running_mean, here.running_mean)
        close(there.running_var, here.running_var)
        assert there.num_batches_tracked == here.num_batches_tracked
    batch = batches(shape, dtype, 1)[0]
    close(eval_step(there, batch.cuda()), eval_step(here, batch))
    cpu, cuda = eval_statistics(here, batch), eval_statistics(there, batch.cuda())
    for name in cpu:
        close(cuda[name], cpu[name])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape, dtype, training):
    state = layer(dtype)
    batch, grad = batches(shape, dtype, 2)
    state = fold(state, train_step(state, batch).moments)
    cpu = backward_step(state, batch, grad, training=training)
    cuda = backward_step(state, batch.cuda(), grad.cuda(), training=training)
    close(cuda.grad_input, cpu.grad_input)
    # Sums over the whole batch of products that were rounded to the batch's dtype.
    scale = max(1.0, float(cpu.grad_weight.abs().max()), float(cpu.grad_bias.abs().max()))
    for name in ("grad_weight", "grad_bias"):
        close(getattr(cuda, name) / scale, getattr(cpu, name) / scale, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_channels_last(dtype):
    state = layer(dtype, channel_axis=-1)
    batch = batches((4, 9, 11, 6), dtype, 1)[0]
    close(train_step(state, batch.cuda()).output, train_step(state, batch).output)
    close(eval_step(state, batch.cuda()), eval_step(state, batch))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_affine_and_without_running_statistics(dtype):
    state = layer(dtype, affine=False, track_running_stats=False)
    batch = batches((16, 6, 5), dtype, 1)[0]
    close(train_step(state, batch.cuda()).output, train_step(state, batch).output)
    close(eval_step(state, batch.cuda()), eval_step(state, batch))


def test_an_empty_batch_has_an_empty_output():
    state = layer(torch.float32)
    assert eval_step(state, torch.empty(0, 6, device="cuda")).shape == (0, 6)


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_staged_is_as_the_cpu(axis, dtype):
    state = layer(dtype, channel_axis=axis)
    batch, grad = batches((4, 6, 9, 6), dtype, 2)
    cpu, cuda = train_step(state, batch), staged(DEVICE, train_step, state, batch)
    close(cuda.output, cpu.output)
    close(cuda.mean, cpu.mean)
    close(cuda.moments.var, cpu.moments.var)
    assert cuda.output.is_contiguous()  # as it travels: nothing is left to do on the event loop
    assert not cuda.output.is_pinned()  # pinned memory is for the way only
    state = fold(state, cpu.moments)
    close(staged(DEVICE, eval_step, state, batch), eval_step(state, batch))
    close(staged(DEVICE, inverse_step, state, batch), inverse_step(state, batch))
    backward = staged(DEVICE, backward_step, state, batch, grad, training=True)
    close(backward.grad_input, backward_step(state, batch, grad, training=True).grad_input)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_staged_takes_the_device_as_a_config_names_it(device):
    state, (batch,) = layer(torch.float32), batches((8, 6), torch.float32, 1)
    close(staged(torch.device(device), eval_step, state, batch), eval_step(state, batch))


def test_an_empty_shard():
    state, empty = layer(torch.float64), torch.empty(0, 6, dtype=torch.float64)
    moments, _ = staged(DEVICE, shard_moments, state, empty)
    assert moments.count == 0
    assert staged(DEVICE, eval_step, state, empty).shape == (0, 6)


def test_threads_do_not_mix_their_batches():
    state = layer(torch.float32)

    def many(seed):
        random = torch.Generator().manual_seed(seed)
        sizes = torch.randint(2, 5000, (20,), generator=random).tolist()
        sent = [torch.randn((rows, 6), generator=random) + seed for rows in sizes]
        return torch.cuda.current_stream(), sent, [staged(DEVICE, train_step, state, batch) for batch in sent]

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(many, range(8)))
    for before, sent, steps in done:
        assert before == torch.cuda.default_stream()
        for batch, step in zip(sent, steps, strict=True):  # compared last: a buffer that was used again would show
            cpu = train_step(state, batch)
            close(step.output, cpu.output)
            close(step.moments.mean, cpu.moments.mean)


def test_a_thread_has_one_stream_and_it_is_not_the_default_one():
    def streams(_):
        return {staged(DEVICE, torch.cuda.current_stream) for _ in range(3)}

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        (first,), (second,) = one.map(streams, [0]), other.map(streams, [0])
    assert len(first) == len(second) == 1
    assert len(first | second | {torch.cuda.default_stream()}) == 3


def test_what_does_not_fit_the_buffer_goes_through_in_pieces():
    way = Staging(CudaQueue(DEVICE), max_bytes=4096)
    (batch,) = batches((1000, 6), torch.float32, 1)
    there = way.upload(batch, DEVICE)
    (back,) = way.download(there * 2)
    assert torch.equal(back, 2 * batch)


def _debug(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself a prototype: it misses some that wait, but none that copies
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture
def waits(monkeypatch):
    """The waits of `staging`; any other that torch knows of raises."""
    counted = []
    wait = CudaQueue.wait

    def allowed(queue):
        counted.append(queue)
        _debug("default")
        wait(queue)
        _debug("error")

    monkeypatch.setattr(CudaQueue, "wait", allowed)
    yield counted
    _debug("default")


SHARD = batches((8, 6, 10), torch.float32, 2)
CALLS = {
    "train": lambda state: (train_step, state, SHARD[0]),
    "eval": lambda state: (eval_step, state, SHARD[0]),
    "inverse": lambda state: (inverse_step, state, SHARD[0]),
    "backward": lambda state: (lambda *args: backward_step(*args, training=True), state, *SHARD),
    "backward of eval": lambda state: (lambda *args: backward_step(*args, training=False), state, *SHARD),
    "shard's moments": lambda state: (shard_moments, state, SHARD[0]),
    "shard's output": lambda state: (
        normalize_with,
        state,
        output_parameters(state),
        SHARD[0],
        shard_moments(state, SHARD[0])[0],
    ),
    "shard's sums": lambda state: (gradient_sums, state, *SHARD),
    "shard's backward": lambda state: (shard_backward, state, *SHARD, gradient_sums(state, *SHARD)),
}


@pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clip"])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_waits_once(waits, call, statistics, clip):
    args = CALLS[call](layer(torch.float32, statistics, clip=clip))
    staged(DEVICE, *args)  # the first call loads kernels and makes the buffer
    waits.clear()
    _debug("error")
    staged(DEVICE, *args)
    _debug("default")
    assert len(waits) == 1


@pytest.mark.anyio
async def test_a_layer_on_the_device():
    """The whole way, with the service's own threads."""
    store = MemoryStore()
    await store.open()
    layers = Layers(store, LayersOptions())
    await layers.open()
    array = np.random.default_rng(0).normal(3, 2, size=(64, 6)).astype(np.float32)
    outputs = {}
    try:
        for device in ("cpu", "cuda"):
            await layers.create(device, LayerConfig(num_features=6, device=device))
            calls = [layers.batches.train, layers.batches.eval, layers.batches.inverse]
            for call in calls:
                extra = (None,) if call == layers.batches.train else ()
                done = await call(device, lambda _: {"input": Tensor.of(array)}, *extra)
                outputs.setdefault(device, []).append(torch.from_numpy(done.output.numpy().copy()))
    finally:
        await layers.close()
        await store.close()
    for cuda, cpu in zip(outputs["cuda"], outputs["cpu"], strict=True):
        close(cuda, cpu)
