"""Moving statistics: torch's rule; the arithmetic is in `kernels.moving`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from batchnorm_client.kernels.moving import fold_rows, momenta, weigh

from ..moments import Moments
from ..moments_stack import MomentsStack
from .base import Accumulator, Array, advance, running_of

if TYPE_CHECKING:
    from ..state import LayerState


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
        running = running_of(state)
        fold_rows(running, stack.counts, stack.mean, stack.var, _momenta(state))
        return advance(state, stack.counts, running)


def _running(state: LayerState, batches: Sequence[Moments]) -> Array:
    """The running mean and variance, (2, C), after these batches."""
    running = running_of(state)
    share = np.empty(running.shape)
    for momentum, moments in zip(_momenta(state), batches, strict=False):
        mean, var = moments.mean.numpy(), moments.var.numpy()
        if moments.correction == 0:
            var = var * (moments.count / (moments.count - 1))  # `unbiased_var`, with less overhead than in torch
        if mean.dtype != running.dtype:
            mean, var = mean.astype(running.dtype), var.astype(running.dtype)
        if moments.strided:  # torch's strided kernel: in float64, rounded once
            share[:] = mean, var
            running[:] = (1 - momentum) * running.astype(np.float64) + momentum * share
            continue
        weight = running.dtype.type(momentum)
        weigh(mean, var, weight, share)
        running *= 1 - weight
        running += share
    return running


def _momenta(state: LayerState) -> Iterator[float]:
    return momenta(state.config.momentum, state.num_batches_tracked)
