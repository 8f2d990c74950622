"""Moving statistics: torch's rule (torch.nn.BatchNorm's note on momentum), rounded as torch rounds it.

    running = (1 - momentum) * running + momentum * batch

with the unbiased variance of the batch, and momentum 1/i for the i-th batch when it is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..moments import Moments
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
        return advance(state, batches, _running(state, batches))


def _running(state: LayerState, batches: Sequence[Moments]) -> Array:
    """The running mean and variance, (2, C), after these batches."""
    running = running_of(state)
    share = np.empty(running.shape, np.float64)
    share_of_var = share[1]
    for number, moments in enumerate(batches, state.num_batches_tracked + 1):
        momentum = 1 / number if state.config.momentum is None else state.config.momentum
        mean, var = moments.mean.numpy(), moments.unbiased_var().numpy()
        if mean.dtype != running.dtype:
            mean, var = mean.astype(running.dtype), var.astype(running.dtype)
        if moments.strided or running.dtype == np.float64:  # torch's strided kernel: in float64, rounded once
            share[:] = mean, var
            running[:] = (1 - momentum) * running.astype(np.float64) + momentum * share
            continue
        # torch's kernel for contiguous float32 rounds momentum, both products and the sum. For the variance, its
        # compiler emits a fused multiply-add, which does not round the product with the batch. This is reproduced in
        # float64: there the product of two float32 is exact, and the sum is then rounded to float32.
        weight = np.float32(momentum)
        share[0] = mean * weight
        np.multiply(var, np.float64(weight), out=share_of_var)
        running *= np.float32(1) - weight
        running += share
    return running
