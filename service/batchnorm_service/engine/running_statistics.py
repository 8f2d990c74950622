"""How the moments of batches are folded into a layer's running statistics, whatever their kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .moments import Moments
from .state import LayerState


def fold(state: LayerState, moments: Moments) -> LayerState:
    """The state after one more batch: `fold_many` of one."""
    return fold_many(state, [moments])


def fold_many(state: LayerState, batches: Sequence[Moments]) -> LayerState:
    """The state after more batches, one after the other. A layer whose tracking is off stays as it is.

    Raises:
        InvalidRequest: a counter would not fit 64 bits any more.
        NonFinite: the folded statistics would not be finite, and the layer rejects that.
    """
    if not (state.tracks and batches):
        return state
    with np.errstate(all="ignore"):  # a layer may allow what is not finite
        return state.accumulator.fold_many(state, batches)
