"""Moving statistics: torch's rule (torch.nn.BatchNorm's note on momentum), rounded as torch rounds it.

    running = (1 - momentum) * running + momentum * batch

with the unbiased variance of the batch, and momentum 1/i for the i-th batch when it is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice, repeat
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_CHUNK: Final = 256
"""Rows whose shares are computed at a time, so that they stay in the processor's cache."""


def momenta(momentum: float | None, batches: int) -> Iterator[float]:
    """The momentum of each next batch, after so many batches."""
    return (1 / number for number in count(batches + 1)) if momentum is None else repeat(momentum)


def fold_rows(running: Array, counts: Sequence[int], mean: Array, var: Array, each: Iterator[float]) -> None:
    """Fold batches into running mean and variance, (2, C), in place, bit-equal to folding them one by one.

    All that does not depend on the rows before is computed for many rows at once.

    Args:
        running: in the layer's dtype.
        counts: values per channel of each batch, (M,), at least 2.
        mean: (M, C) float64.
        var: (M, C) float64, biased.
        each: the momentum of each batch.
    """
    unbiased = np.array([n / (n - 1) for n in counts])[:, None]
    for start in range(0, len(counts), _CHUNK):
        rows = slice(start, start + _CHUNK)
        means = mean[rows].astype(running.dtype, copy=False)
        variances = (var[rows] * unbiased[rows]).astype(running.dtype, copy=False)
        weight = np.fromiter(islice(each, len(means)), running.dtype)[:, None]
        shares = np.empty((len(means), *running.shape))
        weigh(means, variances, weight, shares)
        _add_shares(running.reshape(-1), 1 - weight, shares.reshape(len(means), -1))


def weigh(mean: Array, var: Array, weight: Any, shares: Array) -> None:
    """Write momentum * batch, (..., 2, C) in float64, as torch's kernel for contiguous batches rounds it.

    In float32 it rounds momentum, both products and the sum. For the variance, its compiler emits a fused multiply-add,
    which does not round the product with the batch. This is reproduced in float64: there the product of two float32 is
    exact, and the sum is then rounded to float32.
    """
    shares[..., 0, :] = mean * weight
    np.multiply(var, np.float64(weight), out=shares[..., 1, :])


def _add_shares(running: Array, keep: Array, shares: Array) -> None:
    """running = keep * running + share for each row of shares, in place; product and sum get running's dtype."""
    multiply, add = np.multiply, np.add
    for kept, share in zip(np.broadcast_to(keep, shares.shape), shares, strict=True):
        multiply(running, kept, running)
        add(share, running, share)  # then round: one addition that also rounds is slower
        running[...] = share
