"""Invariant 1 on CUDA: the engine on the device against the engine on the CPU, within stated tolerances.

The kernels sum in another order, so nothing is bit-equal. TOLERANCE bounds |cuda - cpu| by atol + rtol * |cpu|; for
half precision it is one unit in the last place of values around 4, for the rest what sums of a few thousand terms lose.
"""

import pytest
import torch

from batchnorm_client.contract import LayerConfig
from batchnorm_service.engine.gradients import backward_step
from batchnorm_service.engine.normalize import eval_statistics, eval_step, train_step
from batchnorm_service.engine.state import initial_state
from batchnorm_service.engine.statistics import fold

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


def close(cuda, cpu, dtype=None):
    torch.testing.assert_close(cuda.cpu(), cpu, **TOLERANCE[dtype or cpu.dtype])


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
        assert cuda.output.is_cuda
        assert cuda.moments.mean.device.type == "cpu"
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
