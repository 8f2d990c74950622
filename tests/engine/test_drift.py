"""Drift: against its definition in numpy, and its statistics on data that does or does not change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_service.engine import drift, state
from batchnorm_service.engine.moments import Moments
from batchnorm_service.engine.moments_stack import MomentsStack
from batchnorm_service.engine.normalize import train_step
from batchnorm_service.engine.running_statistics import fold
from batchnorm_service.engine.state import LayerState

MEAN, VAR = [1.0, -2.0, 0.0], [4.0, 0.25, 1.0]


def known(mean: Sequence[float] = MEAN, var: Sequence[float] = VAR, **config: Any) -> drift.Reference:
    """A reference with these statistics, of unknown origin."""
    made = state.initial_state(LayerConfig(num_features=len(mean), **config))
    made = made._replace(running_mean=torch.tensor(mean), running_var=torch.tensor(var))
    found = drift.reference(made, from_start=False)
    assert found is not None
    return found


def tensor(batch: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(batch, np.float32))


def normal(rng: np.random.Generator, rows: int, mean: float, deviation: float, channels: int = 3) -> np.ndarray:
    return rng.normal(mean, deviation, (rows, channels)).astype(np.float32)


def measured(reference: drift.Reference, batches: Sequence[np.ndarray]) -> list[drift.Measured]:
    return [drift.measure(reference, tensor(batch)) for batch in batches]


def trained(batches: Sequence[np.ndarray], **config: Any) -> tuple[LayerState, drift.Smoothed, list[float]]:
    """A layer that was trained, what was smoothed, and the score after each batch."""
    layer = state.initial_state(LayerConfig(num_features=batches[0].shape[1], **config))
    sums, scores = drift.nothing(batches[0].shape[1]), []
    for batch in batches:
        moments = train_step(layer, tensor(batch)).moments
        if (reference := drift.reference(layer, from_start=True)) is not None:
            sums = sums.then(drift.smooth(drift.measured_moments(reference, [moments], folded=True)))
            scores.append(drift.judge(sums, reference).score)
        layer = fold(layer, moments)
    return layer, sums, scores


# ---------------------------------------------------------------------------------------------------- the definition


def test_z_and_log_var_ratio_are_weighted_averages() -> None:
    rng = np.random.default_rng(1)
    batches = [normal(rng, 16 + n, 0.3 * n, 1 + 0.2 * n) for n in range(5)]
    shifts, ratios = [], []
    for batch in batches:
        deviation = np.sqrt(np.array(VAR) + 1e-5)
        shifts.append((batch.mean(0) - np.array(MEAN)) / deviation)
        ratios.append((batch.var(0, ddof=1) + 1e-5) / deviation**2)
    weights = 0.8 ** np.arange(5)[::-1]
    found = drift.judge(drift.smooth(measured(known(), batches)), known())
    assert found.batches == 5
    np.testing.assert_allclose(found.z, np.average(shifts, 0, weights), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.log_var_ratio, np.log(np.average(ratios, 0, weights)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [1, -1])
def test_all_values_of_a_channel_count(axis: int) -> None:
    rng = np.random.default_rng(2)
    rows = normal(rng, 4 * 5 * 6, 2, 3)
    images = rows.reshape(4, 5, 6, 3)
    batch = images.transpose(0, 3, 1, 2) if axis == 1 else images
    there = known(channel_axis=axis)
    found = drift.judge(drift.smooth(measured(there, [batch])), there)
    expected = drift.judge(drift.smooth(measured(known(), [rows])), known())
    np.testing.assert_allclose(found.z, expected.z, rtol=1e-4)
    np.testing.assert_allclose(found.log_var_ratio, expected.log_var_ratio, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_input_dtype_is_measured(dtype: torch.dtype) -> None:
    batch = tensor(normal(np.random.default_rng(3), 64, 1, 2)).to(dtype)
    found = drift.measure(known(), batch)
    np.testing.assert_allclose(found.mean[0], batch.double().numpy().mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.var[0], batch.double().numpy().var(0, ddof=1), rtol=1e-4)


def test_sums_over_parts_are_those_over_all() -> None:
    rng = np.random.default_rng(4)
    all_of_them = measured(known(), [normal(rng, 9 + n, n, 2) for n in range(7)])
    whole = drift.smooth(all_of_them)
    for cut in range(1, 7):
        parts = drift.smooth(all_of_them[:cut]).then(drift.smooth(all_of_them[cut:]))
        assert parts.batches == whole.batches
        for one, other in zip(parts[2:], whole[2:], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


def test_a_stack_is_as_its_batches() -> None:
    rng = np.random.default_rng(5)
    batches = [normal(rng, 10 + n, n, 1).astype(np.float64) for n in range(4)]
    stack = MomentsStack(
        [len(batch) for batch in batches],
        np.array([batch.mean(0) for batch in batches]),
        np.array([batch.var(0) for batch in batches]),
    )
    alone = [Moments(len(b), torch.tensor(b.mean(0)), torch.tensor(b.var(0)), correction=0) for b in batches]
    one = drift.smooth(drift.measured_moments(known(), [stack], folded=True))
    other = drift.smooth(drift.measured_moments(known(), alone, folded=True))
    np.testing.assert_allclose(one.vectors, other.vectors, rtol=1e-12)
    assert one.batches == other.batches == 4
    rest = drift.measured_moments(known(), [stack], folded=True)[0].after(3)
    np.testing.assert_allclose(
        drift.smooth([rest]).vectors,
        drift.smooth(drift.measured_moments(known(), alone[3:], folded=True)).vectors,
        rtol=1e-12,
    )


@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5], [7, 1], [1, 2, 3, 2], [2, 2, 2, 2]])
def test_small_batches_are_joined_to_one(sizes: list[int]) -> None:
    rows = normal(np.random.default_rng(6), 8, 3, 2)
    cuts = np.split(rows, np.cumsum(sizes)[:-1])
    one, other = drift.smooth(measured(known(), cuts)), drift.smooth(measured(known(), [rows]))
    np.testing.assert_allclose(one.vectors, other.vectors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.recent, other.recent)
    assert one.batches == len(sizes)
    assert drift.unjoined(measured(known(), cuts)) == 0
    assert drift.unjoined(measured(known(), cuts[:-1])) == len(sizes) - 1


def test_single_values_have_a_shift_and_no_variance_until_they_are_joined() -> None:
    found = drift.judge(drift.smooth(measured(known(), [np.array([[3.0, -2.0, 0.0]])])), known())
    np.testing.assert_allclose(found.z, [1.0, 0.0, 0.0], rtol=1e-5)
    assert found.log_var_ratio.tolist() == [0.0, 0.0, 0.0]


def test_one_batch_is_not_decisive_however_far_it_is() -> None:
    usual = [normal(np.random.default_rng(n), 32, 0, 1) for n in range(40)]
    there = known([0.0] * 3, [1.0] * 3)
    for far in (1e3, 1e30, np.inf, np.nan):
        odd = usual[0].copy()
        odd[:, 1] = far
        sums = drift.smooth(measured(there, [*usual, odd]))
        found = drift.judge(sums, there)
        assert found.worst == 1
        assert found.score == 0
        assert np.isfinite(found.z).all()
        assert np.isfinite(found.log_var_ratio).all()
        assert drift.judge(sums.then(drift.smooth(measured(there, [odd] * 9))), there).score > 2


def test_a_channel_that_is_always_the_same_does_not_drift() -> None:
    there = known([5.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    batch = normal(np.random.default_rng(7), 32, 0, 1)
    batch[:, 0], batch[:, 1] = 5.0, 0.0
    found = drift.judge(drift.smooth(measured(there, [batch] * 20)), there)
    np.testing.assert_allclose(found.z[:2], 0, atol=1e-12)
    np.testing.assert_allclose(found.log_var_ratio[:2], 0, atol=1e-12)
    assert found.scores[:2].tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------- what is known


def test_a_layer_that_learned_nothing_has_no_reference() -> None:
    for config in ({}, {"momentum": 0.0}, {"momentum": None}, {"statistics": "population", "momentum": None}):
        fresh = state.initial_state(LayerConfig(num_features=3, **config))
        assert drift.reference(fresh, from_start=True) is None
        assert drift.reference(fresh, from_start=False) is not None
    untracked = state.initial_state(LayerConfig(num_features=3, track_running_stats=False))
    assert drift.reference(untracked, from_start=False) is None
    assert drift.judge(drift.nothing(3), None).z.tolist() == [0.0, 0.0, 0.0]
    assert drift.judge(drift.nothing(3), None).worst is None


@pytest.mark.parametrize("batches", [1, 3, 20])
def test_what_is_left_of_the_initial_statistics_is_taken_out(batches: int) -> None:
    """After one batch, running_mean is a tenth of the batch's: the same batch again is no drift."""
    batch = normal(np.random.default_rng(8), 64, 30, 0.01)
    layer, _, _ = trained([batch] * batches)
    reference = drift.reference(layer, from_start=True)
    assert reference is not None
    found = drift.judge(drift.smooth(measured(reference, [batch])), reference)
    np.testing.assert_allclose(found.z, 0, atol=1e-2)
    np.testing.assert_allclose(found.log_var_ratio, 0, atol=1e-2)
    naive = drift.reference(layer, from_start=False)
    assert naive is not None
    assert np.abs(drift.judge(drift.smooth(measured(naive, [batch])), naive).z).max() > 5


def test_how_many_values_the_statistics_are_made_of() -> None:
    """The variance of an exponential average is momentum / (2 - momentum) of that of one batch."""
    batches = [normal(np.random.default_rng(n), 50, 0, 1) for n in range(400)]

    def values(**config: Any) -> float:
        reference = drift.reference(trained(batches, **config)[0], from_start=True)
        assert reference is not None
        return reference.values

    assert values() == pytest.approx(50 * 19)
    assert values(momentum=1.0) == pytest.approx(50)
    assert values(momentum=None) == 20_000
    assert values(statistics="population", momentum=None) == 20_000
    half = values(statistics="population", momentum=None, half_life=100.0)
    assert half == pytest.approx(200 / np.log(2))


# ---------------------------------------------------------------------------------------------------- its statistics


def scores(layer: LayerState, sums: drift.Smoothed, batches: Iterator[np.ndarray]) -> list[float]:
    reference = drift.reference(layer, from_start=True)
    assert reference is not None
    found, waiting = [], []
    for batch in batches:
        waiting.append(drift.measure(reference, tensor(batch)))
        if not drift.unjoined(waiting):
            sums, waiting = sums.then(drift.smooth(waiting)), []
            found.append(drift.judge(sums, reference).score)
    return found


@pytest.mark.parametrize("rows", [1, 4, 32, 512])
@pytest.mark.parametrize("trained_rows", [8, 64])
@pytest.mark.parametrize("statistics", ["moving", "population"])
def test_data_that_did_not_change_scores_nothing_whatever_its_batches(
    statistics: str, trained_rows: int, rows: int
) -> None:
    rng = np.random.default_rng(9)
    momentum = 0.1 if statistics == "moving" else None
    batches = [normal(rng, trained_rows, 3, 2, 16) for _ in range(60)]
    layer, sums, in_training = trained(batches, statistics=statistics, momentum=momentum)
    same = (normal(rng, rows, 3, 2, 16) for _ in range(8 * 150 // min(rows, 8)))
    found = scores(layer, sums, same)
    assert len(found) == 150
    assert max(in_training) < 0.1
    assert max(found) < 0.25  # half of the default threshold
    assert np.mean(np.array(found) > 0) < 0.05


@pytest.mark.parametrize("rows", [32, 64, 512])
@pytest.mark.parametrize(
    ("mean", "deviation", "within"),
    [(3.0, 1.0, 10), (-3.0, 1.0, 10), (0.0, 4.0, 10), (0.0, 0.05, 20)],  # that the variance is small takes longest
    ids=["up", "down", "wide", "narrow"],
)
def test_a_change_is_found_soon_and_then_forgotten(rows: int, mean: float, deviation: float, within: int) -> None:
    rng = np.random.default_rng(10)
    layer, sums, _ = trained([normal(rng, 64, 0, 1) for _ in range(60)])

    def changed() -> np.ndarray:
        batch = normal(rng, rows, 0, 1)
        batch[:, 2] = mean + deviation * batch[:, 2]
        return batch

    stream = [normal(rng, rows, 0, 1) for _ in range(50)] + [changed() for _ in range(20)]
    found = scores(layer, sums, iter([*stream, *(normal(rng, rows, 0, 1) for _ in range(100))]))
    assert max(found[:50]) < 0.1
    assert found[49 + within] > 0.5
    assert max(found[-70:]) < 0.25


def test_a_small_change_is_small_however_sure_it_is() -> None:
    """The test set of a data set differs from its training set, too."""
    rng = np.random.default_rng(11)
    layer, sums, _ = trained([normal(rng, 64, 0, 1) for _ in range(300)], momentum=None)
    found = scores(layer, sums, (normal(rng, 4096, 0.2, 1) for _ in range(60)))
    assert 0.02 < found[-1] < 0.2


def test_batches_that_vary_as_those_of_training_did_are_no_drift() -> None:
    """Each batch is of one source, with a mean of its own: that of one batch says little, whatever its size."""
    rng = np.random.default_rng(12)

    def of_one_source() -> np.ndarray:
        return normal(rng, 256, 0, 1) + rng.normal(0, 1, 3).astype(np.float32)

    layer, sums, in_training = trained([of_one_source() for _ in range(300)])
    found = scores(layer, sums, (of_one_source() for _ in range(300)))
    assert max(in_training) < 0.25
    assert max(found) < 0.25
