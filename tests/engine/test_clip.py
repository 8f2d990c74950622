"""`clip`, also where the dtype has no such number: there its largest finite one is the bound."""

from __future__ import annotations

import pytest
import torch

from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_service.engine.gradients import backward_step
from batchnorm_service.engine.moments import merge
from batchnorm_service.engine.normalize import (
    check_whole,
    eval_step,
    normalize_with,
    output_parameters,
    shard_moments,
    train_step,
)
from batchnorm_service.engine.state import LayerState, initial_state, update

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BOUNDS = [0.5, 70000.0, 3.5e38, 1e308]


def _layer(dtype: torch.dtype, clip: float | None, **config: object) -> LayerState:
    state_dtype = "float64" if dtype == torch.float64 else "float32"
    return initial_state(LayerConfig(num_features=3, dtype=state_dtype, clip=clip, **config))


def _batch(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("config", [{}, {"channel_axis": -1}, {"statistics": "population"}, {"affine": False}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", BOUNDS)
def test_outputs_are_those_without_clip_within_the_bound(dtype: torch.dtype, bound: float, config: dict) -> None:
    clipping, plain = _layer(dtype, bound, **config), _layer(dtype, None, **config)
    batch = _batch(dtype)
    for output, without in (
        (train_step(clipping, batch).output, train_step(plain, batch).output),
        (eval_step(clipping, batch), eval_step(plain, batch)),
    ):
        assert output.dtype == dtype
        assert torch.equal(output, without if bound > 1 else without.clamp(-bound, bound))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", BOUNDS)
def test_the_shards_of_a_group_too(dtype: torch.dtype, bound: float) -> None:
    clipping, batch = _layer(dtype, bound), _batch(dtype)
    moments, ranges = shard_moments(clipping, batch)
    check_whole(clipping, moments, ranges)
    step = normalize_with(clipping, output_parameters(clipping), batch, merge([moments], 3))
    assert torch.allclose(step.output.double(), train_step(clipping, batch).output.double(), rtol=1e-2, atol=1e-2)
    assert step.output.abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", BOUNDS[1:])
@pytest.mark.parametrize("training", [True, False])
def test_a_bound_that_nothing_reaches_cuts_no_gradient(dtype: torch.dtype, bound: float, training: bool) -> None:
    batch, gradient = _batch(dtype), torch.ones(8, 3, dtype=dtype)
    gradients = [backward_step(_layer(dtype, clip), batch, gradient, training=training) for clip in (bound, None)]
    for clipped, plain in zip(*gradients, strict=True):
        assert torch.equal(clipped, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_output_is_clipped_to_the_largest_number(dtype: torch.dtype) -> None:
    layer = update(_layer(dtype, 1e308, non_finite="allow"), LayerUpdate(weight=[torch.finfo(torch.float32).max] * 3))
    batch = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    most = min(torch.finfo(dtype).max, 1e308)
    assert eval_step(layer, batch).tolist() == [[most] * 3] * 2
    assert backward_step(layer, batch, torch.ones_like(batch), training=False).grad_input.count_nonzero() == 0
