"""Folding: torch's own running statistics are the oracle, and numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_service.engine.moments import Moments, exact_moments
from batchnorm_service.engine.normalize import train_step
from batchnorm_service.engine.running_statistics import fold, fold_many
from batchnorm_service.engine.state import initial_state, update
from batchnorm_service.engine.state_dict import replace_tensors
from batchnorm_service.engine.tensors import to_wire


def _moments(mean: float, var: float, count: int = 4, correction: int = 1) -> Moments:
    return Moments(count, torch.tensor([mean]), torch.tensor([var]), correction)


def test_momentum_is_the_weight_of_the_new_batch() -> None:
    state = fold(initial_state(LayerConfig(num_features=1, momentum=0.25)), _moments(mean=8.0, var=5.0))
    assert state.running_mean.tolist() == [2.0]  # 0.75 * 0 + 0.25 * 8
    assert state.running_var.tolist() == [2.0]  # 0.75 * 1 + 0.25 * 5
    assert (state.num_batches_tracked, state.samples_tracked) == (1, 4)


def test_without_momentum_every_batch_has_the_same_weight() -> None:
    state = initial_state(LayerConfig(num_features=1, momentum=None))
    for mean, var in [(3.0, 1.0), (6.0, 2.0), (9.0, 6.0)]:
        state = fold(state, _moments(mean, var))
    assert state.running_mean.item() == pytest.approx(6.0)
    assert state.running_var.item() == pytest.approx(3.0)


def test_a_biased_variance_is_made_unbiased_before_it_is_folded() -> None:
    state = fold(initial_state(LayerConfig(num_features=1, momentum=1.0)), _moments(0.0, 3.0, count=4, correction=0))
    assert state.running_var.tolist() == [4.0]  # 3 * 4 / 3


def test_a_layer_whose_tracking_is_off_stays_as_it_is() -> None:
    state = update(initial_state(LayerConfig(num_features=1)), LayerUpdate(track_running_stats=False))
    assert fold(state, _moments(1.0, 1.0)) is state
    never = initial_state(LayerConfig(num_features=1, track_running_stats=False))
    assert fold(never, _moments(1.0, 1.0)) is never


def test_a_folded_state_that_is_not_finite_is_refused_unless_allowed() -> None:
    broken = {"running_mean": to_wire(torch.tensor([float("nan")]))}
    with pytest.raises(errors.NonFinite) as refused:
        fold(replace_tensors(initial_state(LayerConfig(num_features=1)), broken), _moments(1.0, 1.0))
    assert refused.value.fields["field"] == "running_mean"
    allowed = initial_state(LayerConfig(num_features=1, non_finite="allow"))
    assert fold(replace_tensors(allowed, broken), _moments(1.0, 1.0)).running_mean.isnan().all()


def test_a_population_refuses_in_a_group_what_it_refuses_alone() -> None:
    """The variance of the first two samples does not fit float32; that of all of them would."""
    layer = initial_state(LayerConfig(num_features=1, statistics="population", momentum=None))
    wide = Moments(2, torch.tensor([0.0]), torch.tensor([3e38]), correction=0)
    with pytest.raises(errors.NonFinite):
        fold(layer, wide)
    with pytest.raises(errors.NonFinite):
        fold_many(layer, [wide, _moments(0.0, 1.0, count=1000)])


@pytest.mark.parametrize("momentum", [0.1, 1 / 3, 1.0, None])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_many_batches_at_once_are_folded_as_one_after_the_other(momentum: float | None, dtype: str) -> None:
    """Contiguous and strided batches, which torch rounds in two ways, and moments that came in float64."""
    module = nn.BatchNorm2d(8, momentum=momentum, dtype=getattr(torch, dtype))
    layer = initial_state(LayerConfig(num_features=8, momentum=momentum, dtype=dtype))
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(6, 8, 3, 5, generator=generator, dtype=module.weight.dtype) * 3 + 5 for _ in range(12)]
    batches[1::3] = [batch[:, :, :, ::2] for batch in batches[1::3]]
    for batch in batches:
        module(batch)
    moments = [train_step(layer, batch).moments for batch in batches]
    assert {one.strided for one in moments} == {True, False}
    together = fold_many(layer, moments)
    assert torch.equal(together.running_mean, module.running_mean)
    assert torch.allclose(together.running_var, module.running_var, rtol=1e-6, atol=0)
    moments.append(exact_moments(batches[0]))
    one_by_one, together = layer, fold_many(layer, moments)
    for one in moments:
        one_by_one = fold(one_by_one, one)
    assert torch.equal(together.running_mean, one_by_one.running_mean)
    assert torch.equal(together.running_var, one_by_one.running_var)
    assert (together.num_batches_tracked, together.samples_tracked) == (13, one_by_one.samples_tracked)


def test_one_batch_among_many_that_leaves_nothing_finite_refuses_them_all() -> None:
    layer = initial_state(LayerConfig(num_features=1, momentum=0.5))
    many = [_moments(1.0, 1.0), _moments(float("inf"), 1.0), *[_moments(1.0, 1.0)] * 300]
    with pytest.raises(errors.NonFinite):
        fold_many(layer, many)


@pytest.mark.parametrize("momentum", [0.1, 1 / 3, 0.01, 0.9, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_hundred_folds_stay_bit_equal_to_torch(momentum: float | None, dtype: str) -> None:
    """Guards the rounding of momentum: in float32 torch rounds it before it is used, and 1/3 shows the difference."""
    module = nn.BatchNorm1d(32, momentum=momentum, dtype=getattr(torch, dtype))
    state = initial_state(LayerConfig(num_features=32, momentum=momentum, dtype=dtype))
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        batch = torch.randn(16, 32, generator=generator, dtype=getattr(torch, dtype)) * 3 + 5
        before = module.running_var.clone()
        module(batch)
        state = fold(state, train_step(state, batch).moments)
        assert torch.equal(state.running_mean, module.running_mean)
        # torch folds a variance that it has not rounded yet: one unit in the last place a fold is allowed.
        step = torch.nextafter(module.running_var, torch.full_like(before, torch.inf)) - module.running_var
        allowed = step * int(module.num_batches_tracked) if dtype == "float32" else torch.zeros_like(before)
        assert ((state.running_var - module.running_var).abs() <= allowed).all()
    assert state.num_batches_tracked == 100
    assert state.samples_tracked == 1600
