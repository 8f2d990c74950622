"""What every kind of running statistics keeps to: a kind that is registered is tested here."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import get_args

import pytest
import torch

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.errors import NonFinite
from batchnorm_client.wire.statistics import STATISTICS, KindName
from batchnorm_service.engine.accumulators import ACCUMULATORS
from batchnorm_service.engine.moments import Moments
from batchnorm_service.engine.normalize import train_step
from batchnorm_service.engine.running_statistics import fold, fold_many
from batchnorm_service.engine.state import LayerState, initial_state, reset
from batchnorm_service.engine.state_dict import dtypes, replace_tensors, state_dict
from batchnorm_service.layers import records
from batchnorm_service.store.base import Record, Stamp

MADE = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(params=ACCUMULATORS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def _layer(kind: str, dtype: str, **config: object) -> LayerState:
    return initial_state(LayerConfig(num_features=3, statistics=kind, dtype=dtype, **config))


def _batches(layer: LayerState, count: int) -> list[Moments]:
    generator = torch.Generator().manual_seed(4)
    batches = [torch.randn(5, 3, generator=generator, dtype=layer.dtype) + n for n in range(count)]
    return [train_step(layer, batch).moments for batch in batches]


def _bytes(state: LayerState) -> bytes:
    return records.encode_new(state, MADE)


def test_a_new_layer_is_as_torch_makes_it(kind: str, dtype: str) -> None:
    module, layer = torch.nn.BatchNorm1d(3, dtype=getattr(torch, dtype)), _layer(kind, dtype)
    assert torch.equal(layer.running_mean, module.running_mean)
    assert torch.equal(layer.running_var, module.running_var)
    assert _layer(kind, dtype, track_running_stats=False).accumulated is None


def test_batches_that_waited_together_are_folded_as_one_after_the_other(kind: str, dtype: str) -> None:
    one_by_one = layer = _layer(kind, dtype)
    batches = _batches(layer, 9)
    for moments in batches:
        one_by_one = fold(one_by_one, moments)
    together = fold_many(layer, batches)
    assert _bytes(together) == _bytes(one_by_one)
    assert (together.num_batches_tracked, together.samples_tracked) == (9, 45)
    assert _bytes(layer) == _bytes(_layer(kind, dtype))


def test_one_batch_that_leaves_nothing_finite_refuses_all_that_waited_with_it(kind: str, dtype: str) -> None:
    layer = _layer(kind, dtype)
    wide = Moments(2, torch.full((3,), torch.inf, dtype=torch.float64), torch.ones(3, dtype=torch.float64), 0)
    with pytest.raises(NonFinite):
        fold_many(layer, [wide, *_batches(layer, 2)])
    allowed = fold_many(_layer(kind, dtype, non_finite="allow"), [wide, *_batches(layer, 2)])
    assert allowed.num_batches_tracked == 3


def test_a_record_and_a_state_dict_have_all_of_it(kind: str, dtype: str) -> None:
    layer = _layer(kind, dtype)
    trained = fold_many(layer, _batches(layer, 3))
    loaded = records.decode(Record(Stamp(1, 1, 1), _bytes(trained))).state
    replaced = replace_tensors(layer, state_dict(trained))
    assert {name: tensor.dtype for name, tensor in state_dict(trained).items()}.items() <= dtypes(layer).items()
    again = _batches(layer, 6)[3:]
    for state in (loaded, replaced):
        assert state_dict(state) == state_dict(trained)
        assert state_dict(fold_many(state, again)) == state_dict(fold_many(trained, again))


def test_a_reset_starts_it_again(kind: str, dtype: str) -> None:
    layer = _layer(kind, dtype)
    assert _bytes(reset(fold_many(layer, _batches(layer, 3)), "running_stats")) == _bytes(layer)


def test_both_sides_and_type_checkers_know_the_same_kinds() -> None:
    assert ACCUMULATORS.keys() == STATISTICS.keys() == set(get_args(KindName))
