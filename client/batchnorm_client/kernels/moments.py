"""The moments of batches, and merging them; for numpy arrays and torch tensors alike."""

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
    """What a layer's running statistics need of a batch.

    Attributes:
        count: values per channel.
        mean: (C,) float64.
        var: (C,) float64, biased.
    """

    count: int  # type: ignore[assignment]  # a tuple's method of that name is nobody's loss
    mean: npt.NDArray[Any]
    var: npt.NDArray[Any]


class Sums(NamedTuple, Generic[V]):
    """Moments as they are merged.

    Attributes:
        weight: the number of samples per channel, or the sum of their weights.
        mean: (C,) float64.
        m2: (C,) float64, the sum of squared distances from the mean.
    """

    weight: float
    mean: V
    m2: V


def merge(left: Sums[V], right: Sums[V]) -> Sums[V]:
    """Both together (Chan, Golub & LeVeque 1983, eq. 2.1).

    No squares of large numbers are subtracted, so an offset of all samples costs no precision.
    """
    # What is alone is taken as it is: the square of its distance to the other's mean could overflow.
    if not left.weight:
        return right
    if not right.weight:
        return left
    total = left.weight + right.weight
    gap = right.mean - left.mean
    # From the heavier side: the other one's part of the gap is what is rounded.
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
