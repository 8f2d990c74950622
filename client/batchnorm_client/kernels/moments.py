"""The moments of batches, and merging them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


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


def merge(parts: Iterable[BatchMoments], channels: int) -> BatchMoments:
    """The moments of all parts together (Chan, Golub & LeVeque 1983, eq. 2.1): no squares of large numbers."""
    count, mean, m2 = 0, np.zeros(channels), np.zeros(channels)
    for part in parts:
        if not count:  # the first one is taken as it is: the square of its gap to 0 could overflow
            count, mean, m2 = part.count, part.mean, part.var * part.count
        elif part.count:
            total = count + part.count
            gap = part.mean - mean
            mean = mean + gap * (part.count / total)
            m2 = m2 + part.var * part.count + gap * gap * (count * (part.count / total))
            count = total
    return BatchMoments(count, mean, m2 / max(1, count))
