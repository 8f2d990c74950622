"""Population statistics: exact mean and unbiased variance of all samples ever folded, or of those not forgotten yet.

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
from dataclasses import dataclass
from typing import Final

import torch

from batchnorm_client.kernels.moments import Sums, merge

from ..moments import Channels, Moments

_TINY: Final = 1e-300  # a rate below it, times any count, forgets nothing that float64 could tell


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """The accumulators of a population layer.

    Attributes:
        mean: (C,) float64, the weighted mean.
        m2: (C,) float64, the weighted sum of squared distances from the mean.
        weight: the sum of all weights; the number of samples as long as nothing is forgotten.
        squares: the sum of all squared weights; the same number as long as nothing is forgotten.
    """

    mean: Channels
    m2: Channels
    weight: float
    squares: float

    def fold(self, batch: Moments, half_life: float | None) -> Population:
        """The accumulators after one more batch, older samples decayed."""
        keep, weight = _weights(batch.count, half_life)
        old = Sums(self.weight * keep, self.mean, self.m2 * keep)
        new = Sums(weight, batch.mean.double(), batch.biased_var().double() * weight)
        total, mean, m2 = merge(old, new)
        return Population(mean, m2, total, self.squares * keep**2 + weight * (weight / batch.count))

    def unbiased_var(self) -> Channels:
        """M2 / (weight - squares / weight), which is M2 / (n - 1) while every weight is 1; 1 before two samples.

        Also 1 where all samples but one have faded to less than 1e-9 of the weight, as if they had never been.
        """
        freedom = self.weight - self.squares / self.weight if self.weight else 0.0
        # One sample has no freedom at all, but for what float64 rounds.
        return self.m2 / freedom if freedom > 1e-9 * self.weight else torch.ones_like(self.m2)


def empty_population(channels: int) -> Population:
    """Accumulators of nothing."""
    zeros = torch.zeros(channels, dtype=torch.float64)
    return Population(zeros, zeros, 0.0, 0.0)


def _weights(count: int, half_life: float | None) -> tuple[float, float]:
    """What older samples keep, and the sum of the weights of `count` new ones."""
    if half_life is None:
        return 1.0, float(count)
    rate = math.log(2) / half_life
    # The geometric sum 1 + q + q^2 + ... of count terms, q = exp(-rate); for a long half-life 1 - q is exact only so.
    weight = math.expm1(-count * rate) / math.expm1(-rate) if rate > _TINY else float(count)
    return math.exp(-count * rate), weight
