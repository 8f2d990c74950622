"""Drift: how far the batches that come in are from what a layer's running statistics say.

Of each batch with n values per channel, mean m and unbiased variance v, against the running mean M and variance V:

    d = (m - M) / sqrt(V + eps)            how far the mean is shifted, in standard deviations
    r = (v + eps) / (V + eps)              the ratio of the variances

Both are smoothed over the batches, as on an EWMA control chart (Roberts 1959, https://doi.org/10.2307/1266443; Lucas
and Saccucci 1990, https://doi.org/10.2307/1269835): `z` is the average of d, and `log_var_ratio` the logarithm of the
average of r, where a batch counts 0.8 times as much as the next one.

The mean of n independent values varies by 1 / sqrt(n), so a z of 0.5 says little if batches are small. The score is
what is left of the shift when its noise is taken off: the lower confidence limit of |z|, or of half the |log_var_ratio|
(the logarithm of the ratio of standard deviations) if that is larger. For data that did not change it is 0 with high
probability, whatever the size of the batches. docs/drift.md has the formulas and what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from batchnorm_client.kernels.torch import batch_statistics
from batchnorm_client.wire.statistics import STATISTICS

from .layout import Batch, channels_second, values_per_channel
from .moments import Moments
from .moments_stack import MomentsStack
from .state import LayerState

Array = npt.NDArray[np.float64]

SMOOTHING: Final = 0.2
"""The weight of the newest batch. It is halved after 3.1 further ones."""

FULL_VALUES: Final = 8
"""Batches with fewer values per channel are joined until they have as many: the variance of one value is unknown."""

_REFERENCE_SMOOTHING: Final = 0.01
"""The weight of the newest folded batch in what is known about the noise."""

_PRIOR_BATCHES: Final = 10.0
"""How many batches the noise of independent, normal values counts for, before that of folded batches is known."""

_MISTAKES: Final = 1e-4
"""How probable it is that the score of a layer is not 0 at a look, if the noise is normal and nothing changed."""

_SPREAD_ERRORS: Final = 2.5
"""The least noise, in standard errors that the smoothed batches themselves show. A few unusual batches in a row have a
large average, but also a large spread; a lasting shift soon has none."""

_MAX_SHIFT: Final = 10.0
_MAX_RATIO: Final = 100.0
_MAX_JUDGED_RATIO: Final = 4.0
"""Batches beyond these count as these, so that one batch is not decisive, and its influence ends soon. The score has a
narrower limit for the variance, which single values dominate in channels that are nearly constant."""

_HUGE: Final = 1e9
_LEAST_RATIO: Final = 1e-4
_HALF_LIFE_SAMPLES: Final = 2 / math.log(2)
"""Effective number of samples of population statistics with a half-life: (sum w)^2 / sum w^2, in half-lives."""


class Reference(NamedTuple):
    """The running statistics that batches are compared with.

    Attributes:
        state: the layer, which has running statistics.
        left: the weight of their initial values, 0 and 1, that is to be taken out. The layer has not learned these from
            data; Adam corrects its averages in the same way (https://arxiv.org/abs/1412.6980, section 3).
    """

    state: LayerState
    left: float

    @property
    def values(self) -> float:
        """The number of independent values per channel whose mean would vary as much as the running mean."""
        state, left = self.state, self.left
        samples, batches, momentum = state.samples_tracked, state.num_batches_tracked, state.config.momentum
        if not samples or not batches or momentum == 0:
            return math.inf
        if state.config.half_life is not None:
            return min(samples, _HALF_LIFE_SAMPLES * state.config.half_life)
        if momentum is None:
            return samples
        return min(samples, samples / batches * (2.0 - momentum) / momentum * (1.0 - left) / (1.0 + left))


def reference(state: LayerState, *, from_start: bool) -> Reference | None:
    """What batches are compared with; None if the layer has no running statistics, or they say nothing yet.

    Args:
        state: the layer.
        from_start: whether its statistics started from their initial values, and all batches had the present momentum.
    """
    left = _initial_weight(state) if from_start else 0.0
    return None if state.running_mean is None or left >= 1.0 else Reference(state, left)


def _initial_weight(state: LayerState) -> float:
    """The weight of the initial values in the running statistics; 1 if nothing else is in them."""
    momentum = state.config.momentum
    if STATISTICS[state.config.statistics].exact_moments:
        return 0.0 if state.samples_tracked > 1 else 1.0
    if momentum is None:
        return 0.0 if state.num_batches_tracked else 1.0
    return (1.0 - momentum) ** state.num_batches_tracked


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Batches that are to be compared with a reference.

    Attributes:
        counts: values per channel of each, (M,).
        mean: (M, C).
        var: (M, C), unbiased; of a single value, any number.
        known: what they are compared with.
        folded: whether they were folded: then they tell about the noise of batches, too.
    """

    counts: Sequence[int]
    mean: npt.NDArray[Any]
    var: npt.NDArray[Any]
    known: Reference
    folded: bool

    @property
    def nbytes(self) -> int:
        """The size of the numbers."""
        return self.mean.nbytes + self.var.nbytes

    def after(self, batches: int) -> Measured:
        """All but the first batches."""
        return Measured(self.counts[batches:], self.mean[batches:], self.var[batches:], self.known, self.folded)

    def running(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The running mean and variance, as often as there are batches: (M, C)."""
        state, shape = self.known.state, self.mean.shape
        assert state.running_mean is not None  # noqa: S101 - see `reference`
        assert state.running_var is not None  # noqa: S101
        return np.broadcast_to(state.running_mean.numpy(), shape), np.broadcast_to(state.running_var.numpy(), shape)


def measure(known: Reference, batch: Batch) -> Measured:
    """Measure a batch that is not folded. It is on the CPU, and not empty."""
    config = known.state.config
    count = values_per_channel(config, batch)
    mean, var = batch_statistics(channels_second(config, batch), known.state.dtype)
    values = var.numpy() if count > 1 else np.zeros(len(var))
    return Measured([count], mean.numpy()[None], values[None], known, folded=False)


def measured_moments(known: Reference, moments: Iterable[Moments | MomentsStack], *, folded: bool) -> list[Measured]:
    """The measurements of batches whose moments are known, in order."""
    found: list[Measured] = []
    for each in moments:
        if isinstance(each, MomentsStack):
            counts = np.array(each.counts, np.float64)[:, None]
            unbiased = each.var * (counts / np.maximum(counts - 1.0, 1.0))
            found.append(Measured(each.counts, each.mean, unbiased, known, folded))
        else:
            var = each.unbiased_var() if each.count > 1 else each.mean * 0.0
            found.append(Measured([each.count], each.mean.numpy()[None], var.numpy()[None], known, folded))
    return found


class Smoothed(NamedTuple):
    """Sums over batches, from which the drift is judged. Those of later batches are added by `then`.

    Attributes:
        batches: how many batches there were.
        passed: how many full batches, and how many of them folded, the sums before these are older by.
        recent: (4,): the batches' weights, their squares, the weights divided by the values per channel, and the
            weights of those that have a variance.
        noise: (3,): of folded batches, the weights, the weights divided by the values, and those with a variance.
        vectors: (9, C): the recent sums of d, d^2, r, r as it is judged, and the square of that; then for the noise
            those of d, d^2, r as it is judged, and the square of that.
    """

    batches: int
    passed: tuple[float, float]
    recent: Array
    noise: Array
    vectors: Array

    def then(self, later: Smoothed) -> Smoothed:
        """The sums over these and later batches."""
        fast, slow = (1.0 - SMOOTHING) ** later.passed[0], (1.0 - _REFERENCE_SMOOTHING) ** later.passed[1]
        decay = np.array([fast] * _RECENT_VECTORS + [slow] * (_VECTORS - _RECENT_VECTORS))[:, None]
        return Smoothed(
            self.batches + later.batches,
            (self.passed[0] + later.passed[0], self.passed[1] + later.passed[1]),
            self.recent * np.array([fast, fast * fast, fast, fast]) + later.recent,
            self.noise * slow + later.noise,
            self.vectors * decay + later.vectors,
        )


_VECTORS: Final = 9
_RECENT_VECTORS: Final = 5


def nothing(channels: int) -> Smoothed:
    """The sums over no batches."""
    return Smoothed(0, (0.0, 0.0), np.zeros(4), np.zeros(3), np.zeros((_VECTORS, channels)))


def smooth(measured: Sequence[Measured]) -> Smoothed:
    """The sums over these batches, in order."""
    counts, shift, ratio, folded = _joined(measured)
    weights = np.minimum(counts / FULL_VALUES, 1.0)
    with_var = weights * (counts > 1)
    later = weights[::-1].cumsum()[::-1] - weights  # the weights of all batches after each
    fast = (1.0 - SMOOTHING) ** later
    reference_weights = weights * folded
    slow = (1.0 - _REFERENCE_SMOOTHING) ** (reference_weights[::-1].cumsum()[::-1] - reference_weights)
    recent, recent_var = weights * fast, with_var * fast
    noise, noise_var = reference_weights * slow, with_var * folded * slow
    judged = np.minimum(ratio, _MAX_JUDGED_RATIO)
    squares, judged_squares = shift * shift, judged * judged
    return Smoothed(
        sum(len(each.counts) for each in measured),
        (float(weights.sum()), float(reference_weights.sum())),
        np.array([recent.sum(), (recent * recent).sum(), (recent / counts).sum(), recent_var.sum()]),
        np.array([noise.sum(), (noise / counts).sum(), noise_var.sum()]),
        np.stack(
            [
                *(recent @ shift, recent @ squares, recent_var @ ratio, recent_var @ judged),
                *(recent_var @ judged_squares, noise @ shift, noise @ squares),
                *(noise_var @ judged, noise_var @ judged_squares),
            ]
        ),
    )


def _joined(measured: Sequence[Measured]) -> tuple[Array, Array, Array, Array]:
    """Counts, shifts and ratios of batches, and whether each was folded; small ones are joined with the next."""
    counts = np.array([count for each in measured for count in each.counts], np.float64)
    folded = np.array([each.folded for each in measured for _ in each.counts], np.float64)
    shift, ratio, floor = _compared(measured)
    starts = _starts(counts, folded)
    if len(starts) < len(counts):
        group = np.repeat(np.arange(len(starts)), np.diff([*starts, len(counts)]))
        joined = np.add.reduceat(counts, starts)
        means = np.add.reduceat(shift * counts[:, None], starts) / joined[:, None]
        squares = ratio * (counts - 1.0)[:, None] + (shift - means[group]) ** 2 * counts[:, None]
        ratio = np.add.reduceat(squares, starts) / np.maximum(joined - 1.0, 1.0)[:, None]
        counts, shift, folded, floor = joined, means, folded[starts], floor[starts]
    return counts, np.clip(shift, -_MAX_SHIFT, _MAX_SHIFT), np.minimum(ratio + floor, _MAX_RATIO), folded


def _compared(measured: Sequence[Measured]) -> tuple[Array, Array, Array]:
    """Shifts, ratios of variances, and eps in units of the running variance, (M, C) over all batches."""

    def stacked(parts: Iterable[npt.NDArray[Any]]) -> Array:
        return np.concatenate(list(parts), dtype=np.float64)

    mean, var = stacked(each.mean for each in measured), stacked(each.var for each in measured)
    running = [each.running() for each in measured]
    running_mean, running_var = stacked(pair[0] for pair in running), stacked(pair[1] for pair in running)
    left = np.array([each.known.left for each in measured for _ in each.counts])[:, None]
    eps = np.array([each.known.state.config.eps for each in measured for _ in each.counts])[:, None]
    learned = 1.0 - left
    with np.errstate(all="ignore"):  # a layer may allow values that are not finite
        inverse = 1.0 / (np.maximum(running_var - left, 0.0) / learned + eps)
        shift, ratio, floor = (mean - running_mean / learned) * np.sqrt(inverse), var * inverse, eps * inverse
    # What is not finite has drifted as far as is counted. These limits are so wide that they change nothing else.
    shift = np.clip(np.nan_to_num(shift, nan=_HUGE), -_HUGE, _HUGE)
    ratio = np.clip(np.nan_to_num(ratio, nan=_HUGE), 0.0, _HUGE)
    return shift, ratio, np.nan_to_num(floor, nan=1.0)


def _starts(counts: Array, folded: Array) -> list[int]:
    """Where each group of batches that are joined starts: consecutive ones, all folded or none."""
    starts: list[int] = []
    values, kind = math.inf, -1.0
    for index, (count, is_folded) in enumerate(zip(counts.tolist(), folded.tolist(), strict=True)):
        if values >= FULL_VALUES or is_folded != kind:
            starts.append(index)
            values, kind = 0.0, is_folded
        values += count
    return starts


def unjoined(measured: Sequence[Measured]) -> int:
    """How many of the last measurements, each of one batch, wait to be joined with others: those of the last group."""
    waiting, values = 0, 0
    for each in reversed(measured):
        if len(each.counts) != 1 or each.folded != measured[-1].folded:
            break
        values += each.counts[0]
        if values >= FULL_VALUES:
            return 0
        waiting += 1
    return waiting


class Drift(NamedTuple):
    """The drift of a layer.

    Attributes:
        batches: how many batches were compared.
        z: (C,), the smoothed shift of the mean, in standard deviations.
        log_var_ratio: (C,), the logarithm of the smoothed ratio of variances.
        scores: (C,), the part of the larger of |z| and |log_var_ratio| / 2 that noise does not explain.
    """

    batches: int
    z: Array
    log_var_ratio: Array
    scores: Array

    @property
    def score(self) -> float:
        """The largest score of a channel."""
        return float(self.scores.max())

    @property
    def worst(self) -> int | None:
        """The channel with this score; of several, the one that is shifted most; None if there was no batch."""
        if not self.batches:
            return None
        size = np.maximum(np.abs(self.z), np.abs(self.log_var_ratio) / 2)
        return int(np.where(self.scores == self.scores.max(), size, -1.0).argmax())


def judge(smoothed: Smoothed, known: Reference | None) -> Drift:
    """The drift that the sums show."""
    channels = smoothed.vectors.shape[1]
    if known is None or not smoothed.batches:
        return Drift(smoothed.batches, np.zeros(channels), np.zeros(channels), np.zeros(channels))
    weight, squares, per_value, with_var = smoothed.recent.tolist()
    noise_weight, noise_per_value, noise_with_var = smoothed.noise.tolist()
    shift, shift_squares, ratio, judged, judged_squares, *noise_vectors = smoothed.vectors
    noise_shift, noise_shift_squares, noise_ratio, noise_ratio_squares = noise_vectors
    values = weight / per_value
    noise_values = noise_weight / noise_per_value if noise_weight else values

    # The variance of the shift and of the ratio of one batch, as those of folded batches were.
    one_shift = _noise(noise_shift, noise_shift_squares, noise_weight, 1.0 / noise_values)
    one_ratio = _noise(noise_ratio, noise_ratio_squares, noise_with_var, 2.0 / max(noise_values - 1.0, 1.0))
    usual = (_PRIOR_BATCHES + noise_ratio) / (_PRIOR_BATCHES + noise_with_var)

    # The chart begins at no drift: before there are enough batches, the missing ones had none.
    full = max(weight, 1.0 / SMOOTHING)
    full_var = max(with_var, 1.0 / SMOOTHING)
    mean_shift, mean_ratio = shift / full, (judged + full_var - with_var) / full_var
    recent_shift = np.maximum(shift_squares / full - mean_shift**2, 0.0)
    recent_ratio = np.maximum((judged_squares + full_var - with_var) / full_var - mean_ratio**2, 0.0)
    averaged = squares / full**2
    factor = averaged * max(noise_values / values, 1.0) + noise_values / known.values
    errors = _errors(channels)
    shift_noise = np.maximum(errors * np.sqrt(one_shift * factor), _SPREAD_ERRORS * np.sqrt(recent_shift * averaged))
    ratio_noise = np.maximum(errors * np.sqrt(one_ratio * factor), _SPREAD_ERRORS * np.sqrt(recent_ratio * averaged))

    more = (mean_ratio - ratio_noise) / np.maximum(usual, 1.0)
    # A ratio that is less than usual varies less, too: this is 1 where the ratio is less by its noise, and then falls.
    least = np.minimum(usual, 1.0)
    relative = ratio_noise / least
    less = least / (mean_ratio * (1.0 + relative) + least * relative**2)
    by_ratio = np.log(np.maximum(np.maximum(more, less), 1.0)) / 2
    scores = np.maximum(np.maximum(np.abs(mean_shift) - shift_noise, 0.0), by_ratio)
    average = ratio / with_var if with_var else np.ones(channels)
    return Drift(smoothed.batches, shift / weight, np.log(np.maximum(average, _LEAST_RATIO)), scores)


def _noise(total: Array, squares: Array, weight: float, independent: float) -> Array:
    """The variance of batches, of which these are the sums; that of independent values before there are some."""
    spread = np.maximum(squares - total**2 / weight, 0.0) if weight else squares
    return (_PRIOR_BATCHES * independent + spread) / (_PRIOR_BATCHES + weight)


@lru_cache
def _errors(channels: int) -> float:
    """How many standard errors are noise: two sides of two numbers of each channel may be wrong (Bonferroni)."""
    return NormalDist().inv_cdf(1.0 - _MISTAKES / (4 * channels))
