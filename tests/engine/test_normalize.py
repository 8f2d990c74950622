"""Normalizing: numbers worked out by hand, torch's module, and everything that is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.engine.moments import check_finite
from batchnorm_service.engine.normalize import (
    check_input,
    check_whole,
    eval_statistics,
    eval_step,
    named_statistics,
    shard_moments,
    train_step,
)
from batchnorm_service.engine.running_statistics import fold
from batchnorm_service.engine.state import LayerState, initial_state, update
from batchnorm_service.engine.state_dict import replace_tensors
from batchnorm_service.engine.tensors import to_wire


def _layer(channels: int, **config: object) -> LayerState:
    return initial_state(LayerConfig(num_features=channels, **config))


def test_two_values_become_minus_one_and_one() -> None:
    # mean 5, biased variance 4: (3 - 5) / 2 and (7 - 5) / 2; the unbiased variance is 8.
    step = train_step(_layer(1, dtype="float64", eps=1e-300), torch.tensor([[3.0], [7.0]], dtype=torch.float64))
    assert step.output.flatten().tolist() == [-1.0, 1.0]
    assert step.moments.mean.tolist() == [5.0]
    assert step.moments.unbiased_var().tolist() == [8.0]
    assert step.moments.biased_var().tolist() == [4.0]
    assert step.moments.count == 2
    assert step.invstd.tolist() == [0.5]


def test_eval_uses_the_running_statistics() -> None:
    state = replace_tensors(
        _layer(1, dtype="float64", eps=1e-300),
        {
            "running_mean": to_wire(torch.tensor([10.0], dtype=torch.float64)),
            "running_var": to_wire(torch.tensor([4.0], dtype=torch.float64)),
            "weight": to_wire(torch.tensor([3.0], dtype=torch.float64)),
            "bias": to_wire(torch.tensor([1.0], dtype=torch.float64)),
        },
    )
    output = eval_step(state, torch.tensor([[10.0], [14.0]], dtype=torch.float64))
    assert output.flatten().tolist() == [1.0, 7.0]
    assert eval_statistics(state, output)["batch_invstd"].tolist() == [0.5]


@given(
    st.integers(2, 40),
    st.integers(1, 8),
    st.floats(-100, 100),
    st.floats(0.1, 100),
    st.integers(0, 2**32 - 1),
)
def test_gamma_and_beta_of_the_batch_give_the_input_back(
    count: int, channels: int, offset: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(count, channels, dtype=torch.float64, generator=generator) * scale + offset
    state = _layer(channels, dtype="float64")
    var, mean = torch.var_mean(batch, 0, correction=0)
    undo = {"weight": to_wire((var + state.config.eps).sqrt()), "bias": to_wire(mean)}
    output = train_step(replace_tensors(state, undo), batch).output
    assert torch.allclose(output, batch, rtol=1e-12, atol=1e-12 * (abs(offset) + scale))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("toggled_off", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_training_equals_torchs_module(dtype: str, affine: bool, toggled_off: bool, shape: tuple[int, ...]) -> None:
    """Guards the half-precision output of a layer without weight and buffers, which torch rounds differently."""
    kept = "float64" if dtype == "float64" else "float32"
    module = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](
        3, affine=affine, dtype=getattr(torch, kept)
    )
    state = _layer(3, affine=affine, dtype=kept)
    if toggled_off:
        module.track_running_stats = False
        state = update(state, LayerUpdate(track_running_stats=False))
    batch = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(getattr(torch, dtype))
    step = train_step(state, batch)
    assert torch.equal(step.output, module(batch))
    state = fold(state, step.moments)
    assert torch.equal(state.running_mean, module.running_mean)
    assert state.num_batches_tracked == int(module.num_batches_tracked)
    assert torch.equal(eval_step(state, batch), module.eval()(batch))
    wide = batch.double().movedim(1, 0).reshape(3, -1)
    named = named_statistics(step)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    assert torch.allclose(named["batch_mean"].double(), wide.mean(1), **tolerance)
    assert torch.allclose(named["batch_var"].double(), wide.var(1, correction=0), **tolerance)
    assert torch.allclose(named["batch_invstd"].double(), (wide.var(1, correction=0) + 1e-5).rsqrt(), **tolerance)


@pytest.mark.parametrize("axis", [-1, 2, -2])
def test_other_channel_axes_equal_torch_on_the_moved_view(axis: int) -> None:
    state = _layer(3, channel_axis=axis)
    shape = [4, 5, 6, 7]
    shape[axis] = 3
    batch = torch.randn(shape)
    module = nn.BatchNorm2d(3)
    expected = module(batch.movedim(axis, 1)).movedim(1, axis)
    step = train_step(state, batch)
    assert torch.equal(step.output, expected)
    state = fold(state, step.moments)
    assert torch.equal(state.running_mean, module.running_mean)
    assert torch.allclose(state.running_var, module.running_var, rtol=2e-7, atol=0)


def test_a_layer_created_without_running_statistics_evaluates_with_the_batchs() -> None:
    state = _layer(3, track_running_stats=False)
    batch = torch.randn(8, 3)
    assert torch.equal(eval_step(state, batch), nn.BatchNorm1d(3, track_running_stats=False).eval()(batch))
    with pytest.raises(errors.TooFewValues):
        eval_step(state, batch[:1])
    assert eval_step(state, batch[:0]).shape == (0, 3)


def test_an_empty_batch_is_refused_in_training_and_gives_an_empty_output_in_eval() -> None:
    empty = torch.empty(0, 3, 4, dtype=torch.bfloat16)
    with pytest.raises(errors.TooFewValues):
        train_step(_layer(3), empty)
    output = eval_step(_layer(3), empty)
    assert (output.shape, output.dtype) == (empty.shape, empty.dtype)


def test_one_value_per_channel_is_refused_in_training_and_fine_in_eval() -> None:
    with pytest.raises(errors.TooFewValues) as refused:
        train_step(_layer(3), torch.ones(1, 3, 1))
    assert refused.value.fields["got"] == 1
    assert torch.allclose(eval_step(_layer(3), torch.ones(1, 3)), torch.ones(1, 3), atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ([[1.0, math.nan], [1.0, 2.0]], "NaN"),
        ([[1.0, 2.0], [math.inf, 2.0]], "infinity"),
        ([[-math.inf, 2.0], [math.inf, 2.0]], "both infinities"),
        ([[3e38, 1.0], [-3e38, 2.0]], "variance over float32"),
    ],
)
def test_non_finite_batches_are_refused_unless_allowed(batch: list[list[float]], what: str) -> None:
    with pytest.raises(errors.NonFinite):
        train_step(_layer(2), torch.tensor(batch))
    allowed, module = _layer(2, non_finite="allow"), nn.BatchNorm1d(2)
    step = train_step(allowed, torch.tensor(batch))
    assert torch.equal(step.output.nan_to_num(9), module(torch.tensor(batch)).nan_to_num(9)), what


def test_statistics_near_the_end_of_float32_are_not_taken_for_an_overflow() -> None:
    """The quick check sums all channels, and that sum overflows here though no statistic does."""
    check_finite(torch.full((8,), 3e38), "the mean", "input")
    with pytest.raises(errors.NonFinite):
        check_finite(torch.tensor([math.inf, -math.inf]), "the mean", "input")


@pytest.mark.parametrize(("value", "eps"), [(2.0**123, 1e-5), (-(2.0**123), 1e-5), (1e-3, 1e-80), (0.0, 1e-80)])
def test_what_overflows_on_the_way_to_the_output_is_refused(value: float, eps: float) -> None:
    """Mean and variance are finite, and exact arithmetic would give 0; torch gives NaN or infinity."""
    batch = torch.full((8, 2), value)
    assert train_step(_layer(2, eps=eps, non_finite="allow"), batch).output.isfinite().logical_not().all()
    with pytest.raises(errors.NonFinite, match="the output"):
        train_step(_layer(2, eps=eps), batch)
    moments, ranges = shard_moments(_layer(2, eps=eps), batch)
    with pytest.raises(errors.NonFinite, match="the output"):
        check_whole(_layer(2, eps=eps), moments, ranges)


def test_an_output_that_overflows_float16_is_refused() -> None:
    heavy = update(_layer(1), LayerUpdate(weight=[6e4]))
    batch = torch.zeros(64, 1, dtype=torch.float16)
    batch[0] = 1  # (1 - 1/64) / std = sqrt(63): 8 * 6e4 is over float16's 65504
    with pytest.raises(errors.NonFinite) as refused:
        train_step(heavy, batch)
    assert "output" in refused.value.detail
    train_step(update(heavy, LayerUpdate(weight=[6e3])), batch)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_parameter_that_is_not_finite_is_refused_in_training_by_its_name(name: str, value: float) -> None:
    """It was set by PATCH, and the batch is not to blame."""
    layer, batch = update(_layer(2), LayerUpdate.model_validate({name: [1.0, value]})), torch.randn(4, 2)
    with pytest.raises(errors.NonFinite, match=f"the layer's {name}") as alone:
        train_step(layer, batch)
    with pytest.raises(errors.NonFinite, match=f"the layer's {name}") as together:
        check_whole(layer, *shard_moments(layer, batch))
    assert alone.value.fields["field"] == together.value.fields["field"] == name
    allowed = update(layer, LayerUpdate(non_finite="allow"))
    assert not train_step(allowed, batch).output[:, 1].isfinite().any()


@pytest.mark.parametrize(
    ("config", "dtype", "shape", "error"),
    [
        ({}, "float64", (4, 3), errors.DtypeMismatch),
        ({}, "int64", (4, 3), errors.DtypeMismatch),
        ({"dtype": "float64"}, "float32", (4, 3), errors.DtypeMismatch),
        ({}, "float32", (3,), errors.ShapeMismatch),
        ({}, "float32", (), errors.ShapeMismatch),
        ({}, "float32", (4, 4), errors.ShapeMismatch),
        ({"affine": False, "track_running_stats": False}, "float32", (4, 4), errors.ShapeMismatch),
        ({"dimensions": 1}, "float32", (4, 3, 2, 2), errors.ShapeMismatch),
        ({"dimensions": 2}, "float32", (4, 3), errors.ShapeMismatch),
        ({"dimensions": 3}, "float32", (4, 3, 2, 2), errors.ShapeMismatch),
        ({"channel_axis": -1}, "float32", (4, 3, 2), errors.ShapeMismatch),
        ({"channel_axis": 3}, "float32", (4, 3), errors.ShapeMismatch),
        ({"channel_axis": -2}, "float32", (3, 4), errors.ShapeMismatch),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_by_name(
    config: dict, dtype: str, shape: tuple[int, ...], error: type
) -> None:
    items = {"float32": 4, "float64": 8, "int64": 8}[dtype] * math.prod(shape)
    with pytest.raises(error) as refused:
        check_input(LayerConfig(num_features=3, **config), Tensor(dtype, shape, bytes(items)))
    assert refused.value.fields["field"] == "input"
    assert {"expected", "got"} <= set(refused.value.fields)
