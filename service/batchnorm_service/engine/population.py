"""Population statistics: exact mean and unbiased variance of all samples ever folded, or of those not forgotten yet.

Accumulators (sum of weights, mean, M2) in float64, merged by Chan's formula. Without a half-life every sample weighs
1, so neither the order nor the grouping of the batches matters. With a half-life of h samples, a sample that n newer
ones follow weighs 2^(-n/h): decay by samples, not by calls, so how samples are split into batches matters little (those
of one batch are taken as equally old, and share the weight that they would have one by one).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from .moments import Channels, Moments

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
        keep, weight, squares = _weights(batch.count, half_life)
        old = self.weight * keep
        total = old + weight
        gap = batch.mean.double() - self.mean
        return Population(
            mean=self.mean + gap * (weight / total),
            m2=self.m2 * keep + batch.m2().double() * (weight / batch.count) + gap * gap * (old * (weight / total)),
            weight=total,
            squares=self.squares * keep**2 + squares,
        )

    def unbiased_var(self) -> Channels:
        """M2 / (weight - squares / weight), which is M2 / (n - 1) while every weight is 1; 1 before two samples."""
        freedom = self.weight - self.squares / self.weight if self.weight else 0.0
        # One sample has no freedom at all, but for what float64 rounds.
        return self.m2 / freedom if freedom > 1e-9 * self.weight else torch.ones_like(self.m2)


def empty_population(channels: int) -> Population:
    """Accumulators of nothing."""
    zeros = torch.zeros(channels, dtype=torch.float64)
    return Population(zeros, zeros, 0.0, 0.0)


def _weights(count: int, half_life: float | None) -> tuple[float, float, float]:
    """What older samples keep, and the sum and the sum of squares of the weights of `count` new ones."""
    if half_life is None:
        return 1.0, float(count), float(count)
    rate = math.log(2) / half_life
    # Geometric sums 1 + q + q^2 + ... of count terms, q = exp(-rate); for a long half-life 1 - q is exact only so.
    weight = math.expm1(-count * rate) / math.expm1(-rate) if rate > _TINY else float(count)
    squares = math.expm1(-2 * count * rate) / math.expm1(-2 * rate) if rate > _TINY else float(count)
    return math.exp(-count * rate), weight, squares
