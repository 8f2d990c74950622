"""The moments of batches, and how to merge them; for numpy arrays and for torch tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, Final, Generic, NamedTuple, TypeVar

import numpy.typing as npt

V = TypeVar("V", bound=Any)
"""A numpy array or a torch tensor, (C,) float64."""

_CHUNK: Final = 1 << 17  # elements that are widened to float64 at a time, so that they stay in the processor's cache


class BatchMoments(NamedTuple):
    """Count, mean and variance of a batch per channel: all that a layer's running statistics need of it.

    Attributes:
        count: values per channel.
        mean: (C,) float64.
        var: (C,) float64, biased.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which is not used
    mean: npt.NDArray[Any]
    var: npt.NDArray[Any]


class Sums(NamedTuple, Generic[V]):
    """Moments in the form in which they are merged.

    Attributes:
        weight: the number of samples per channel, or the sum of their weights.
        mean: (C,) float64.
        m2: (C,) float64, the sum of squared distances from the mean.
    """

    weight: float
    mean: V
    m2: V


def merge(left: Sums[V], right: Sums[V]) -> Sums[V]:
    """The sums of both sets of samples together (Chan, Golub & LeVeque 1983, eq. 2.1).

    No squares of large numbers are subtracted, so an offset of all samples costs no precision.
    """
    # If one is empty, return the other unchanged: the square of the distance of their means could overflow.
    if not left.weight:
        return right
    if not right.weight:
        return left
    total = left.weight + right.weight
    gap = right.mean - left.mean
    # Starting from the mean with the larger weight, so that the rounded term is small.
    if left.weight >= right.weight:
        mean = left.mean + gap * (right.weight / total)
    else:
        mean = right.mean - gap * (left.weight / total)
    return Sums(total, mean, left.m2 + right.m2 + gap * gap * (left.weight * (right.weight / total)))


def merge_chunks(batch: Any, chunk_sums: Callable[[Any], Sums[V]], nothing: Sums[V]) -> Sums[V]:
    """The sums of a batch, some rows at a time, so that no second copy of it is made in float64.

    Args:
        batch: (N, C, *), numpy or torch.
        chunk_sums: of some of the batch's rows.
        nothing: the sums of an empty batch.
    """
    return reduce(merge, map(chunk_sums, chunks(batch)), nothing)


def chunks(batch: Any, chunk: int = _CHUNK) -> list[Any]:
    """A batch (N, C, *), some rows at a time: views of about `chunk` elements, none of them empty."""
    rows, elements = batch.shape[0], math.prod(batch.shape)
    step = max(1, chunk * rows // max(1, elements))
    return [batch[start : start + step] for start in range(0, rows if elements else 0, step)]
