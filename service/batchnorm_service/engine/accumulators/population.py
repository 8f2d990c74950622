"""Population statistics: exact mean and unbiased variance of all folded samples, optionally with exponential decay.

Accumulators (sum of weights, mean, M2) in float64, merged by Chan's formula. Without a half-life every sample weighs
1, so neither the order nor the grouping of the batches matters. With a half-life of h samples, a sample that n newer
ones follow weighs 2^(-n/h): decay by samples, not by calls. The samples of one batch are equally old: they share, in
equal parts, the weight that they would have one by one.

The unbiased variance of samples with weights w_i (reliability weights) is M2 / (V1 - V2 / V1), V1 = sum of w_i,
V2 = sum of w_i^2. For with independent x_i of variance s^2 and mean m (taken as 0), and M = sum of w_i x_i / V1,

    E[sum of w_i (x_i - M)^2] = E[sum of w_i x_i^2] - V1 E[M^2] = V1 s^2 - V1 (V2 / V1^2) s^2 = (V1 - V2 / V1) s^2

A batch of n samples and weight W gives each of them W / n, so it adds n (W / n)^2 = W^2 / n to V2. Decay multiplies
every w_i by k: V1 and M2 by k, V2 by k^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from batchnorm_client.kernels.moments import Sums, merge
from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.errors import InvalidRequest
from batchnorm_client.wire.tensors import Tensor as WireTensor

from ..moments import Channels, Moments
from ..moments_stack import MomentsStack
from ..tensors import counter_to_wire, to_torch, to_wire
from .base import SAMPLES, Accumulator, advance

if TYPE_CHECKING:
    from ..state import LayerState

MEAN: Final = "population_mean"
M2: Final = "population_m2"
WEIGHTS: Final = "population_weights"
"""(2,) float64: the sums of the samples' weights and of their squares; absent if every sample has weight 1."""

_DERIVED: Final = ("running_mean", "running_var")
_LEAST_FREEDOM: Final = 1e-9
"""Of the unbiased variance, as a part of the weight."""

_TINY: Final = 1e-300  # with a lower decay rate, the weights of any number of samples round to 1 in float64


class Population(Accumulator):
    """Running statistics over all samples; `LayerState.accumulated` is a `PopulationSums`."""

    def start(self, config: LayerConfig) -> PopulationSums:
        """The sums of no samples."""
        zeros = torch.zeros(config.num_features, dtype=torch.float64)
        return PopulationSums(zeros, zeros, 0.0, 0.0)

    def fold(self, state: LayerState, moments: Moments) -> LayerState:
        """The state after one more batch."""
        sums: PopulationSums = state.accumulated.fold(moments, state.config.half_life)
        return _advance(state, [moments.count], sums)

    def fold_stack(self, state: LayerState, stack: MomentsStack) -> LayerState:
        """The state after the batches of a stack, merged in one step unless something on the way could overflow."""
        if not _stays_finite(state, stack):
            return super().fold_stack(state, stack)
        return _advance(state, stack.counts, state.accumulated.fold_stack(stack, state.config.half_life))

    def layout(self, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The sample counter and the sums."""
        return {
            SAMPLES: ("int64", ()),
            MEAN: ("float64", (channels,)),
            M2: ("float64", (channels,)),
            WEIGHTS: ("float64", (2,)),
        }

    def tensors(self, state: LayerState) -> dict[str, WireTensor]:
        """The sample counter and the sums."""
        sums, samples = state.accumulated, state.samples_tracked
        tensors = {SAMPLES: counter_to_wire(samples), MEAN: to_wire(sums.mean), M2: to_wire(sums.m2)}
        if (sums.weight, sums.squares) != (samples, samples):
            tensors[WEIGHTS] = to_wire(torch.tensor([sums.weight, sums.squares], dtype=torch.float64))
        return tensors

    def read(self, tensors: Mapping[str, WireTensor], samples: int) -> PopulationSums:
        """The sums of a record."""
        weight, squares = to_torch(tensors[WEIGHTS]).tolist() if WEIGHTS in tensors else [float(samples)] * 2
        return PopulationSums(to_torch(tensors[MEAN]), to_torch(tensors[M2]), weight, squares)

    def replace(self, state: LayerState, new: dict[str, Any]) -> LayerState:
        """The state with replaced sums. Running statistics are derived from them, and refused if they differ."""
        old: PopulationSums = state.accumulated
        for name in (M2, WEIGHTS):
            if name in new and bool((new[name] < 0).any()):
                raise InvalidRequest(f"{name} must not be negative", field=name, expected=">= 0", got="negative")
        given: dict[str, Any] = {name: new.pop(name) for name in (*_DERIVED, MEAN, M2, WEIGHTS) if name in new}
        samples = new.get(SAMPLES, state.samples_tracked)
        weight, squares = old.weight, old.squares
        if WEIGHTS in given:
            weight, squares = given[WEIGHTS].tolist()
        elif SAMPLES in new:
            weight = squares = float(samples)
        _check_weights(samples, weight, squares)
        if samples == 0:
            given = {MEAN: torch.zeros_like(old.mean), M2: torch.zeros_like(old.m2)} | given
        if samples < 2 and bool((given.get(M2, old.m2) != 0).any()):
            raise InvalidRequest(f"{M2} of fewer than two samples is 0", field=M2, expected=0)
        after = state._replace(**new)
        if given.keys() - _DERIVED or SAMPLES in new:
            sums = PopulationSums(given.get(MEAN, old.mean), given.get(M2, old.m2), weight, squares)
            running_mean, running_var = sums.running(state.dtype)
            after = after._replace(accumulated=sums, running_mean=running_mean, running_var=running_var)
        for name in _DERIVED:
            if name in given and not torch.equal(given[name].nan_to_num(), getattr(after, name).nan_to_num()):
                raise InvalidRequest(
                    f"{name} of a population layer follows from {MEAN}, {M2} and {SAMPLES}; set those",
                    field=name,
                    expected=f"what follows from {MEAN}, {M2} and {SAMPLES}",
                )
        return after


@dataclass(frozen=True, slots=True, eq=False)
class PopulationSums:
    """Weighted sums from which a population layer's running statistics are derived.

    Attributes:
        mean: (C,) float64, the weighted mean.
        m2: (C,) float64, the weighted sum of squared distances from the mean.
        weight: the sum of all weights; without decay, the number of samples.
        squares: the sum of all squared weights; without decay, the number of samples.
    """

    mean: Channels
    m2: Channels
    weight: float
    squares: float

    def fold(self, batch: Moments, half_life: float | None) -> PopulationSums:
        """The sums after one more batch, with the weights of older samples decayed."""
        keep, weight = _decay(batch.count, half_life)
        old = Sums(self.weight * keep, self.mean, self.m2 * keep)
        new = Sums(weight, batch.mean.double(), batch.biased_var().double() * weight)
        total, mean, m2 = merge(old, new)
        return PopulationSums(mean, m2, total, self.squares * keep**2 + weight * (weight / batch.count))

    def fold_stack(self, stack: MomentsStack, half_life: float | None) -> PopulationSums:
        """The sums after the batches of a stack."""
        counts = np.array(stack.counts, np.float64)
        weights, kept = counts, np.ones(len(counts) + 1)  # of each batch's samples; by batch, after those from it on
        if half_life is not None:
            rate = math.log(2) / half_life
            weights = np.array([_decay(count, half_life)[1] for count in stack.counts])
            kept = np.exp(-rate * np.append(np.cumsum(counts[::-1])[::-1], 0.0))
        weights = weights * kept[1:]
        total, squares = float(weights.sum()), float((weights * (weights / counts)).sum())
        # The distances from the first row's mean are small numbers, whatever the offset of all of them.
        mean = stack.mean[0] + weights @ (stack.mean - stack.mean[0]) / total
        gaps = stack.mean - mean
        m2 = weights @ stack.var + weights @ (gaps * gaps)
        keep = float(kept[0])
        old = Sums(self.weight * keep, self.mean, self.m2 * keep)
        merged = merge(old, Sums(total, torch.from_numpy(mean), torch.from_numpy(m2)))
        return PopulationSums(merged.mean, merged.m2, merged.weight, self.squares * keep**2 + squares)

    def unbiased_var(self) -> Channels:
        """M2 / (weight - squares / weight), which is M2 / (n - 1) if every weight is 1.

        1 for fewer than two samples, and if one sample has all but 1e-9 of the weight.
        """
        freedom = self.weight - self.squares / self.weight if self.weight else 0.0
        # The threshold is above 0 because of rounding errors: one sample has 0 degrees of freedom.
        return self.m2 / freedom if freedom > _LEAST_FREEDOM * self.weight else torch.ones_like(self.m2)

    def running(self, dtype: torch.dtype) -> tuple[Channels, Channels]:
        """The running mean and variance, (C,), in the layer's dtype."""
        return self.mean.to(dtype), self.unbiased_var().to(dtype)


def _advance(state: LayerState, counts: Sequence[int], sums: PopulationSums) -> LayerState:
    return advance(state, counts, np.array([vector.numpy() for vector in sums.running(state.dtype)]), sums)


def _stays_finite(state: LayerState, stack: MomentsStack) -> bool:
    """Whether the statistics are finite after every row, by a bound: each is of samples that these moments describe.

    The variance of samples is at most the largest variance of a batch plus the square of the largest distance of two
    means. Weights may make the unbiased one larger by the threshold in `unbiased_var`.
    """
    sums: PopulationSums = state.accumulated
    old_var = float(sums.m2.max()) / sums.weight if sums.weight else 0.0
    mean = max(float(np.abs(stack.mean).max()), float(sums.mean.abs().max()))
    bound = max(float(stack.var.max()), old_var) + 4 * mean * mean
    return bound < _LEAST_FREEDOM * torch.finfo(state.dtype).max


def _check_weights(samples: int, weight: float, squares: float) -> None:
    """Refuse impossible sums of weights: each weight is at most 1, so squares <= weight <= samples."""
    tolerance = 1 + 1e-9  # for rounding errors of the sums
    fits = (
        0 < squares <= weight * tolerance
        and weight <= samples * tolerance
        and weight**2 <= samples * squares * tolerance  # Cauchy-Schwarz
    )
    if not (fits if samples else weight == squares == 0):
        raise InvalidRequest(
            f"{WEIGHTS} do not fit {SAMPLES} {samples}",
            field=WEIGHTS,
            expected="the sum of the samples' weights, each at most 1, and of their squares",
            got=[weight, squares],
        )


def _decay(count: int, half_life: float | None) -> tuple[float, float]:
    """The factor for the weights of older samples, and the sum of the weights of `count` new ones."""
    if half_life is None:
        return 1.0, float(count)
    rate = math.log(2) / half_life
    # The geometric sum 1 + q + q^2 + ... of `count` terms, q = exp(-rate); expm1 avoids cancellation in 1 - q.
    weight = math.expm1(-count * rate) / math.expm1(-rate) if rate > _TINY else float(count)
    return math.exp(-count * rate), weight
