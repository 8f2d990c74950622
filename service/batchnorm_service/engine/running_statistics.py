"""Folds the moments of batches into a layer's running statistics of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .moments import Moments
from .state import LayerState


def fold(state: LayerState, moments: Moments) -> LayerState:
    """The state after one more batch: `fold_many` of one."""
    return fold_many(state, [moments])


def fold_many(state: LayerState, batches: Sequence[Moments]) -> LayerState:
    """The state after these batches, in order; the same state if tracking is off.

    Raises:
        InvalidRequest: a counter would exceed 64 bits.
        NonFinite: the folded statistics are not finite, and the layer rejects that.
    """
    if not (state.tracks and batches):
        return state
    with np.errstate(all="ignore"):  # a layer may allow non-finite values
        return state.accumulator.fold_many(state, batches)
