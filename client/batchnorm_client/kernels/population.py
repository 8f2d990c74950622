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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic

import numpy as np
import numpy.typing as npt

from batchnorm_client.kernels.moments import Sums, V, merge

Array = npt.NDArray[Any]

LEAST_FREEDOM: Final = 1e-9
"""Of the unbiased variance, as a part of the weight."""

_TINY: Final = 1e-300  # with a lower decay rate, the weights of any number of samples round to 1 in float64


@dataclass(frozen=True, slots=True, eq=False)
class PopulationSums(Generic[V]):
    """Weighted sums from which a population layer's running statistics are derived.

    Attributes:
        mean: (C,) float64, the weighted mean.
        m2: (C,) float64, the weighted sum of squared distances from the mean.
        weight: the sum of all weights; without decay, the number of samples.
        squares: the sum of all squared weights; without decay, the number of samples.
    """

    mean: V
    m2: V
    weight: float
    squares: float

    def fold(self, count: int, mean: V, var: V, half_life: float | None) -> PopulationSums[V]:
        """The sums after one more batch, with the weights of older samples decayed; `var` is biased."""
        keep, weight = _decay(count, half_life)
        return self._merged(keep, Sums(weight, mean, var * weight), weight * (weight / count))

    def fold_rows(
        self, counts: Sequence[int], mean: Array, var: Array, half_life: float | None, convert: Callable[[Array], V]
    ) -> PopulationSums[V]:
        """The sums after several batches, (M, C), merged in one step; `convert` makes a vector of these sums' type."""
        sizes = np.array(counts, np.float64)
        weights, kept = sizes, np.ones(len(sizes) + 1)  # of each batch's samples; by batch, after those from it on
        if half_life is not None:
            rate = math.log(2) / half_life
            weights = np.array([_decay(count, half_life)[1] for count in counts])
            kept = np.exp(-rate * np.append(np.cumsum(sizes[::-1])[::-1], 0.0))
        weights = weights * kept[1:]
        total, squares = float(weights.sum()), float((weights * (weights / sizes)).sum())
        # The distances from the first row's mean are small numbers, whatever the offset of all of them.
        middle = mean[0] + weights @ (mean - mean[0]) / total
        gaps = mean - middle
        m2 = weights @ var + weights @ (gaps * gaps)
        return self._merged(float(kept[0]), Sums(total, convert(middle), convert(m2)), squares)

    def _merged(self, keep: float, new: Sums[V], squares: float) -> PopulationSums[V]:
        merged = merge(Sums(self.weight * keep, self.mean, self.m2 * keep), new)
        return PopulationSums(merged.mean, merged.m2, merged.weight, self.squares * keep**2 + squares)

    def unbiased_var(self, ones: V) -> V:
        """M2 / (weight - squares / weight), which is M2 / (n - 1) if every weight is 1.

        `ones`, for fewer than two samples, and if one sample has all but 1e-9 of the weight.
        """
        freedom = self.weight - self.squares / self.weight if self.weight else 0.0
        # The threshold is above 0 because of rounding errors: one sample has 0 degrees of freedom.
        var: V = self.m2 / freedom if freedom > LEAST_FREEDOM * self.weight else ones
        return var


def _decay(count: int, half_life: float | None) -> tuple[float, float]:
    """The factor for the weights of older samples, and the sum of the weights of `count` new ones."""
    if half_life is None:
        return 1.0, float(count)
    rate = math.log(2) / half_life
    # The geometric sum 1 + q + q^2 + ... of `count` terms, q = exp(-rate); expm1 avoids cancellation in 1 - q.
    weight = math.expm1(-count * rate) / math.expm1(-rate) if rate > _TINY else float(count)
    return math.exp(-count * rate), weight
