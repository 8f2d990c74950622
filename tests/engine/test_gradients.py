"""The backward pass: autograd through torch's module is the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig
from batchnorm_service.engine.gradients import backward_step, gradient_sums, merge_sums, shard_backward
from batchnorm_service.engine.normalize import eval_step
from batchnorm_service.engine.state import LayerState, initial_state
from batchnorm_service.engine.state_dict import replace_tensors
from batchnorm_service.engine.tensors import to_wire


def _pair(dtype: str, affine: bool, tracks: bool = True) -> tuple[nn.BatchNorm2d, LayerState]:
    kept = "float64" if dtype == "float64" else "float32"
    module = nn.BatchNorm2d(3, affine=affine, track_running_stats=tracks, dtype=getattr(torch, kept))
    generator = torch.Generator().manual_seed(1)
    if affine:
        nn.init.normal_(module.weight, generator=generator)
        nn.init.normal_(module.bias, generator=generator)
    if tracks:
        module.running_mean.normal_(generator=generator)
        module.running_var.uniform_(0.5, 2, generator=generator)
    state = initial_state(
        LayerConfig(num_features=3, affine=affine, track_running_stats=tracks, dtype=kept, channel_axis=1)
    )
    tensors = {name: to_wire(tensor) for name, tensor in module.state_dict().items()}
    return module, replace_tensors(state, tensors) if tensors else state


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_bit_equal_to_autograds(dtype: str, affine: bool, tracks: bool, training: bool) -> None:
    module, state = _pair(dtype, affine, tracks)
    module.train(training)
    batch = torch.randn(4, 3, 5, 6).to(getattr(torch, dtype)).requires_grad_()
    grad_output = torch.randn(4, 3, 5, 6).to(batch.dtype)
    module(batch).backward(grad_output)
    gradients = backward_step(state, batch.detach(), grad_output, training=training)
    assert torch.equal(gradients.grad_input, batch.grad)
    if affine:
        assert torch.equal(gradients.grad_weight, module.weight.grad)
        assert torch.equal(gradients.grad_bias, module.bias.grad)
    else:
        assert gradients.grad_weight is gradients.grad_bias is None


def test_clipped_outputs_have_no_gradient() -> None:
    config = LayerConfig(num_features=1, dtype="float64", clip=1.0, affine=False)
    state = initial_state(config)
    batch = torch.tensor([[0.5], [3.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((batch / (1 + 1e-5) ** 0.5).clamp(-1, 1).sum(), batch)
    gradients = backward_step(state, batch.detach(), torch.ones(3, 1, dtype=torch.float64), training=False)
    assert torch.allclose(gradients.grad_input, expected, rtol=1e-15)
    assert eval_step(state, batch.detach()).flatten().tolist()[1:] == [1.0, -1.0]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("sizes", [[2, 3, 4], [1, 8], [0, 5, 4]])
def test_shards_together_have_the_gradients_of_the_whole_batch(sizes: list[int], affine: bool) -> None:
    _, state = _pair("float64", affine)
    batch = torch.randn(9, 3, 2, 2, dtype=torch.float64) * 4 + 100
    grad_output = torch.randn(9, 3, 2, 2, dtype=torch.float64)
    expected = backward_step(state, batch, grad_output, training=True)
    shards = list(zip(batch.split(sizes), grad_output.split(sizes), strict=True))
    whole = merge_sums([gradient_sums(state, *shard) for shard in shards], 3)
    parts = [shard_backward(state, *shard, whole) for shard in shards]
    assert torch.allclose(torch.cat([part.grad_input for part in parts]), expected.grad_input, rtol=1e-9, atol=1e-12)
    if affine:
        assert torch.allclose(sum(part.grad_weight for part in parts), expected.grad_weight, rtol=1e-9)
        assert torch.allclose(sum(part.grad_bias for part in parts), expected.grad_bias, rtol=1e-12)


def test_batch_statistics_of_one_value_have_no_gradient() -> None:
    _, state = _pair("float64", affine=True)
    one = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    with pytest.raises(errors.TooFewValues):
        backward_step(state, one, one, training=True)
    empty = one[:0]
    assert backward_step(state, empty, empty, training=False).grad_input.shape == (0, 3, 1, 1)
