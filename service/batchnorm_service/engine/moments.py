"""`Moments`: count, mean and variance per channel of a batch, which running statistics are computed from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from batchnorm_client.kernels import moments as kernels
from batchnorm_client.kernels.moments import Sums
from batchnorm_client.kernels.torch import exact_sums
from batchnorm_client.wire.errors import InvalidRequest, NonFinite

Channels = Float[Tensor, "C"]

INT64_MAX: Final = 2**63 - 1
"""The largest value of a counter, which is an int64 tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and variance per channel of one batch.

    Attributes:
        count: values per channel, N*H*W.
        mean: (C,).
        var: (C,).
        correction: as in `torch.var`: 1 when `var` is unbiased (divided by count - 1), 0 when biased.
        strided: whether torch uses its kernel for batches that are neither contiguous nor channels last in memory,
            which rounds running statistics differently.
    """

    count: int
    mean: Channels
    var: Channels
    correction: int
    strided: bool = False

    @property
    def batches(self) -> int:
        """How many batches they are of."""
        return 1

    def unbiased_var(self) -> Channels:
        """The variance divided by count - 1: what feeds running_var."""
        return self.var if self.correction == 1 else self.var * (self.count / (self.count - 1))

    def biased_var(self) -> Channels:
        """The variance divided by count: what normalizes the batch."""
        return self.var if self.correction == 0 else self.var * ((self.count - 1) / self.count)

    def m2(self) -> Channels:
        """The sum of squared distances from the mean."""
        return self.var * (self.count - self.correction)

    def check_finite(self, mean_field: str = "input", var_field: str = "input") -> None:
        """Raise `NonFinite` if a mean or variance is NaN or infinite, naming the field that the caller sent."""
        if all(map(math.isfinite, sums_of_squares(self.mean, self.var))):
            return
        check_finite(self.mean, "the batch's mean", mean_field)
        check_finite(self.var, "the batch's variance", var_field)


class Extremes(NamedTuple):
    """Range of a batch's values, to bound its output.

    Attributes:
        low: (C,) float64, the smallest values; infinity if there are none.
        high: (C,) float64, the largest values; -infinity if there are none.
        limit: the largest finite number of the output's dtype.
    """

    low: Channels
    high: Channels
    limit: float


def empty_extremes(channels: int) -> Extremes:
    """The range of an empty batch, or of one whose output is not computed by the service."""
    none = torch.full((channels,), math.inf, dtype=torch.float64)
    return Extremes(none, -none, math.inf)


def extremes(batch: Float[Tensor, "N C *rest"]) -> Extremes:
    """The range of a batch."""
    if batch.numel() == 0:
        return empty_extremes(batch.shape[1])
    axes = [axis for axis in range(batch.dim()) if axis != 1]
    low, high = (bound.double().cpu() for bound in (batch.amin(axes), batch.amax(axes)))
    return Extremes(low, high, torch.finfo(batch.dtype).max)


def merge_extremes(parts: list[Extremes], channels: int) -> Extremes:
    """The range over all parts; the limit is that of the narrowest dtype."""
    whole = empty_extremes(channels)
    for part in parts:
        low, high = torch.minimum(whole.low, part.low), torch.maximum(whole.high, part.high)
        whole = Extremes(low, high, min(whole.limit, part.limit))
    return whole


def check_finite(tensor: Tensor, what: str, field: str) -> None:
    """Raise `NonFinite`, with `field` and the first such index, if an element is NaN or infinite."""
    # A finite sum has finite terms. It can also overflow with finite terms: only then check each.
    if math.isfinite(float(tensor.sum())):
        return
    bad = (~tensor.isfinite()).flatten().nonzero()
    if len(bad):
        raise NonFinite(
            f"{what} is not finite in {len(bad)} place(s), first at index {int(bad[0])}; "
            'a layer with non_finite: "allow" takes such batches',
            field=field,
            expected="finite",
            got=str(float(tensor.flatten()[bad[0]])),
        )


def sums_of_squares(*vectors: Channels) -> list[float]:
    """The sum of squares of each vector, infinity on overflow. With numpy, which has less overhead than torch."""
    arrays = [vector.numpy() for vector in vectors]
    with np.errstate(all="ignore"):
        return [float(array.dot(array)) for array in arrays]


def check_fits(name: str, count: int) -> None:
    """Raise `InvalidRequest` if a counter exceeds int64."""
    if count > INT64_MAX:
        raise InvalidRequest(f"{name} would be {count}, over {INT64_MAX}", field=name, expected=f"<= {INT64_MAX}")


def exact_moments(batch: Float[Tensor, "N C *rest"]) -> Moments:
    """Count, mean and biased variance of a batch on the CPU, in float64 whatever its dtype."""
    return _of_sums(exact_sums(batch))


def merge(parts: Iterable[Moments], channels: int) -> Moments:
    """The moments over all parts, in float64: see `kernels.moments.merge`."""
    zeros = torch.zeros(channels, dtype=torch.float64)
    sums = (Sums(part.count, part.mean.double(), part.m2().double()) for part in parts)
    return _of_sums(reduce(kernels.merge, sums, Sums(0, zeros, zeros)))


def _of_sums(sums: Sums[Channels]) -> Moments:
    count = int(sums.weight)
    return Moments(count, sums.mean, sums.m2 / float(max(1, count)), correction=0)  # the count may exceed int64
