"""`non_finite: reject`: no infinite output leaves a train call, whatever the kernel's roundings make of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.errors import NonFinite
from batchnorm_service.engine.moments import merge, merge_extremes
from batchnorm_service.engine.normalize import check_whole, normalize_with, output_parameters, shard_moments, train_step
from batchnorm_service.engine.state import LayerState, initial_state, update

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EPS = [1e-5, 1e-12, 1e-14, 1e-15, 1e-16, 1e-17, 1e-20, 1e-30, 1e-50, 1e-80, 1e-300]
CONFIGS = [
    {},
    {"affine": False},
    {"affine": False, "track_running_stats": False},
    {"channel_axis": -1},
    {"statistics": "population"},
]
VALUES = [0.0, 1e-3, 60.0, 1000.0, 33333.0, 60000.0, -60000.0]


def _layer(dtype: torch.dtype, **config: object) -> LayerState:
    return initial_state(
        LayerConfig(num_features=2, dtype="float64" if dtype == torch.float64 else "float32", **config)
    )


def _batches(dtype: torch.dtype, config: dict) -> list[torch.Tensor]:
    """Channels of one value, exact or with some noise, of several lengths and memory layouts."""
    random = torch.Generator().manual_seed(7)
    batches = []
    for value, rows, noise in itertools.product(VALUES, (2, 7, 40), (0.0, 1e-2)):
        rest = () if rows == 40 else (3,)
        shape = (rows, *rest, 2) if config.get("channel_axis") == -1 else (rows, 2, *rest)
        spread = 1 + noise * torch.rand(shape, dtype=torch.float64, generator=random)
        batches.append((value * spread).to(dtype))
    return batches


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", EPS)
def test_an_output_is_finite_or_refused_and_refused_only_if_it_is_not(
    dtype: torch.dtype, eps: float, config: dict
) -> None:
    layer, tolerant = _layer(dtype, eps=eps, **config), _layer(dtype, eps=eps, non_finite="allow", **config)
    for batch in _batches(dtype, config):
        finite = bool(train_step(tolerant, batch).output.isfinite().all())
        if finite:
            assert train_step(layer, batch).output.isfinite().all()
        else:
            with pytest.raises(NonFinite, match="the output"):
                train_step(layer, batch)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", EPS)
def test_a_group_that_is_not_refused_has_finite_outputs(dtype: torch.dtype, eps: float, config: dict) -> None:
    layer = _layer(dtype, eps=eps, **config)
    for batch in _batches(dtype, config):
        shards = batch[: len(batch) // 2].clone(), batch[len(batch) // 2 :].clone()
        parts = [shard_moments(layer, shard) for shard in shards]
        whole = merge([moments for moments, _ in parts], 2)
        try:
            check_whole(layer, whole, merge_extremes([ranges for _, ranges in parts], 2))
        except NonFinite:
            assert eps < 1e-9, "refused for roundings that cannot be so large"
            continue
        for shard in shards:
            assert normalize_with(layer, output_parameters(layer), shard, whole).output.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_small_weight_does_not_hide_that_the_deviation_overflows(dtype: torch.dtype) -> None:
    """1 / sqrt(eps) is 1e40: infinite in float32, though its product with the weight would be 1e10."""
    layer = update(_layer(dtype, eps=1e-80), LayerUpdate(weight=[1e-30, 1e-30]))
    batch = torch.zeros(4, 2, dtype=dtype)
    with pytest.raises(NonFinite, match="the output"):
        train_step(layer, batch)
    with pytest.raises(NonFinite, match="the output"):
        check_whole(layer, *shard_moments(layer, batch))


@pytest.mark.parametrize("value", [3e37, 1e30])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_overflows_the_kernels_sums_is_refused_also_where_the_statistics_are_float64(
    config: dict, value: float
) -> None:
    """The sum of 300 times 3e37, and squares of 1e30, are beyond float32; a population is added up in float64."""
    tolerant = _layer(torch.float32, non_finite="allow", **config)
    batch = torch.full((300, 2), value)
    batch[::2] *= 0.5
    strided = batch if config.get("channel_axis") == -1 else batch.T.contiguous().T
    for one in (batch, strided):
        with pytest.raises(NonFinite):
            train_step(_layer(torch.float32, **config), one)
        with pytest.raises(NonFinite):
            check_whole(_layer(torch.float32, **config), *shard_moments(tolerant, one))
