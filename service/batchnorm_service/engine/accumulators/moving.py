"""Moving statistics: torch's rule (torch.nn.BatchNorm's note on momentum), rounded as torch rounds it.

    running = (1 - momentum) * running + momentum * batch

with the unbiased variance of the batch, and momentum 1/i for the i-th batch when it is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice, repeat
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..moments import Moments
from ..moments_stack import MomentsStack
from .base import Accumulator, Array, advance, running_of

if TYPE_CHECKING:
    from ..state import LayerState

_CHUNK: Final = 256
"""Rows of a stack whose shares are computed at a time, so that they stay in the processor's cache."""


class Moving(Accumulator):
    """Running statistics as in `torch.nn.BatchNorm*`; nothing else is accumulated."""

    def fold(self, state: LayerState, moments: Moments) -> LayerState:
        """The state after one more batch."""
        return self.fold_many(state, [moments])

    def fold_many(self, state: LayerState, batches: Sequence[Moments]) -> LayerState:
        """The state after several batches.

        Only the last result is checked for finite values: moving statistics that are not finite stay so.
        """
        return advance(state, [moments.count for moments in batches], _running(state, batches))

    def fold_stack(self, state: LayerState, stack: MomentsStack) -> LayerState:
        """The state after the batches of a stack, bit-equal to folding them one by one; checked as by `fold_many`."""
        return advance(state, stack.counts, _running_after_stack(state, stack))


def _running(state: LayerState, batches: Sequence[Moments]) -> Array:
    """The running mean and variance, (2, C), after these batches."""
    running = running_of(state)
    share = np.empty(running.shape)
    for momentum, moments in zip(_momenta(state), batches, strict=False):
        mean, var = moments.mean.numpy(), moments.unbiased_var().numpy()
        if mean.dtype != running.dtype:
            mean, var = mean.astype(running.dtype), var.astype(running.dtype)
        if moments.strided:  # torch's strided kernel: in float64, rounded once
            share[:] = mean, var
            running[:] = (1 - momentum) * running.astype(np.float64) + momentum * share
            continue
        weight = running.dtype.type(momentum)
        _weigh(mean, var, weight, share)
        running *= 1 - weight
        running += share
    return running


def _running_after_stack(state: LayerState, stack: MomentsStack) -> Array:
    """The same for a stack: all that does not depend on the rows before is computed for many rows at once."""
    running = running_of(state)
    unbiased = np.array([n / (n - 1) for n in stack.counts])[:, None]
    momenta = _momenta(state)
    for start in range(0, stack.batches, _CHUNK):
        rows = slice(start, start + _CHUNK)
        mean = stack.mean[rows].astype(running.dtype, copy=False)
        var = (stack.var[rows] * unbiased[rows]).astype(running.dtype, copy=False)
        weight = np.fromiter(islice(momenta, len(mean)), running.dtype)[:, None]
        shares = np.empty((len(mean), *running.shape))
        _weigh(mean, var, weight, shares)
        _add_shares(running.reshape(-1), 1 - weight, shares.reshape(len(mean), -1))
    return running


def _weigh(mean: Array, var: Array, weight: Any, shares: Array) -> None:
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


def _momenta(state: LayerState) -> Iterator[float]:
    """The momentum of each next batch."""
    if state.config.momentum is not None:
        return repeat(state.config.momentum)
    return (1 / number for number in count(state.num_batches_tracked + 1))
