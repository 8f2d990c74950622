"""Stacks of moments: folded as batch after batch would be, and refused by the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.errors import InvalidRequest, NonFinite, TooFewValues
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.engine.moments import INT64_MAX
from batchnorm_service.engine.moments_stack import MomentsStack
from batchnorm_service.engine.posted import check_posted, posted_moments
from batchnorm_service.engine.running_statistics import fold, fold_many
from batchnorm_service.engine.state import LayerState, initial_state

ROWS, CHANNELS = 600, 5  # more rows than one chunk has
KINDS = [
    pytest.param({}, id="moving"),
    pytest.param({"momentum": None}, id="cumulative"),
    pytest.param({"momentum": 1.0}, id="the last batch"),
    pytest.param({"dtype": "float64", "momentum": 0.3}, id="float64"),
    pytest.param({"statistics": "population"}, id="population"),
    pytest.param({"statistics": "population", "half_life": 90.0}, id="half-life"),
    pytest.param({"statistics": "population", "half_life": 3.0, "dtype": "float64"}, id="short half-life"),
]


def _stack(seed: int, rows: int = ROWS, offset: float = 3.0) -> MomentsStack:
    random = np.random.default_rng(seed)
    counts = random.integers(2, 40, rows).tolist()
    return MomentsStack(counts, random.normal(offset, 2, (rows, CHANNELS)), random.random((rows, CHANNELS)) * 4)


def _layer(**config: object) -> LayerState:
    return fold_many(initial_state(LayerConfig(num_features=CHANNELS, **config)), list(_stack(1, 3).rows()))


@pytest.mark.parametrize("config", KINDS)
def test_a_stack_is_folded_as_its_batches_one_after_the_other(config: dict[str, object]) -> None:
    layer, stack = _layer(**config), _stack(2)
    at_once, one_by_one = fold(layer, stack), fold_many(layer, list(stack.rows()))
    assert at_once.num_batches_tracked == one_by_one.num_batches_tracked == ROWS + 3
    assert at_once.samples_tracked == one_by_one.samples_tracked
    if layer.config.statistics == "moving":
        assert torch.equal(at_once.running_mean, one_by_one.running_mean)
        assert torch.equal(at_once.running_var, one_by_one.running_var)
        return
    for name in ("mean", "m2", "weight", "squares"):
        found, expected = (np.asarray(getattr(state.accumulated, name)) for state in (at_once, one_by_one))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_a_population_of_stacks_is_numpys(offset: float) -> None:
    random = np.random.default_rng(5)
    batches = [random.normal(offset, 1, (count, CHANNELS)) for count in random.integers(1, 30, 300)]
    layer = initial_state(LayerConfig(num_features=CHANNELS, statistics="population", dtype="float64"))
    for part in (batches[:1], batches[1:200], batches[200:]):
        moments = [np.array([one.mean(0) for one in part]), np.array([one.var(0) for one in part])]
        layer = fold(layer, MomentsStack([len(one) for one in part], *moments))
    samples = np.concatenate(batches)
    np.testing.assert_allclose(layer.running_mean, samples.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.running_var, samples.var(0, ddof=1), rtol=1e-12 if offset == 0 else 1e-7)


@pytest.mark.parametrize("config", KINDS)
def test_batches_and_stacks_that_waited_together_keep_their_order(config: dict[str, object]) -> None:
    layer, first, last = _layer(**config), _stack(3, 4), _stack(4, 2)
    batch = _stack(5, 1).row(0)
    mixed = fold_many(layer, [batch, first, batch, batch, last])
    one_by_one = fold_many(layer, [batch, *first.rows(), batch, batch, *last.rows()])
    assert mixed.num_batches_tracked == one_by_one.num_batches_tracked
    torch.testing.assert_close(mixed.running_var, one_by_one.running_var, rtol=1e-12, atol=0)


def _changed(field: str, row: int, value: float) -> MomentsStack:
    stack = _stack(6)
    getattr(stack, field)[row] = value
    return stack


def _read(stack: MomentsStack) -> None:
    config = LayerConfig(num_features=CHANNELS)
    sent = {"count": np.array(stack.counts), "mean": stack.mean, "var": stack.var}
    moments, _ = posted_moments(config, {name: Tensor.of(array) for name, array in sent.items()})
    check_posted(config, moments)


@pytest.mark.parametrize(
    ("field", "value", "error", "named"),
    [
        ("counts", 1, TooFewValues, "count"),
        ("counts", -4, InvalidRequest, "count"),
        ("var", -1e-9, InvalidRequest, "var"),
        ("var", np.nan, NonFinite, "var"),
        ("mean", np.inf, NonFinite, "mean"),
    ],
)
def test_a_bad_row_is_named(field: str, value: float, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=r"^row 417: ") as raised:
        _read(_changed(field, 417, value))
    assert (raised.value.fields["row"], raised.value.fields["field"]) == (417, named)


def test_finite_numbers_whose_squares_overflow_are_no_bad_rows() -> None:
    _changed("mean", 3, 1e200).check_finite("mean", "var")


@pytest.mark.parametrize("config", KINDS)
def test_a_row_that_overflows_the_statistics_is_named(config: dict[str, object]) -> None:
    """Also where later rows would bring a population's variance back into range: row by row it is refused, too."""
    value = 1e300 if config.get("dtype") == "float64" else 1e39
    layer = initial_state(LayerConfig(num_features=CHANNELS, **config))
    fits = config.get("dtype") == "float64" and layer.config.statistics == "moving"
    stack = _changed("mean", 12, value)
    stack.var[13:] = 0.0
    if fits:
        assert fold(layer, stack).running_mean.isfinite().all()
        return
    with pytest.raises(NonFinite, match=r"^row 12: ") as raised:
        fold(layer, stack)
    assert raised.value.fields["row"] == 12


@pytest.mark.parametrize("config", KINDS)
def test_a_layer_that_allows_it_folds_non_finite_rows(config: dict[str, object]) -> None:
    layer, stack = _layer(**config, non_finite="allow"), _changed("mean", 300, np.nan)
    at_once, one_by_one = fold(layer, stack), fold_many(layer, list(stack.rows()))
    np.testing.assert_array_equal(at_once.running_mean, one_by_one.running_mean)
    np.testing.assert_array_equal(at_once.running_var, one_by_one.running_var)


def test_a_row_that_overflows_the_counter_is_named() -> None:
    layer = _layer(statistics="population")._replace(samples_tracked=INT64_MAX - 60)
    stack = MomentsStack([50, 10, 1], np.ones((3, CHANNELS)), np.ones((3, CHANNELS)))
    with pytest.raises(InvalidRequest, match=r"^row 2: samples_tracked"):
        fold(layer, stack)
    assert fold(layer, MomentsStack([50, 10], stack.mean[:2], stack.var[:2])).samples_tracked == INT64_MAX
