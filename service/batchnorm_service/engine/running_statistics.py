"""Folds the moments of batches into a layer's running statistics of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchnorm_client.wire.errors import ProblemError

from .moments import Moments
from .moments_stack import MomentsStack, in_row
from .state import LayerState


def fold(state: LayerState, moments: Moments | MomentsStack) -> LayerState:
    """The state after one more batch or stack: `fold_many` of one."""
    return fold_many(state, [moments])


def fold_many(state: LayerState, folds: Sequence[Moments | MomentsStack]) -> LayerState:
    """The state after these batches and stacks, in order; the same state if tracking is off.

    Raises:
        InvalidRequest: a counter would exceed 64 bits.
        NonFinite: the folded statistics are not finite, and the layer rejects that.
    """
    if not state.tracks:
        return state
    batches: list[Moments] = []  # that come one after the other
    with np.errstate(all="ignore"):  # a layer may allow non-finite values
        for moments in folds:
            if isinstance(moments, Moments):
                batches.append(moments)
                continue
            state = _fold_stack(_fold_batches(state, batches), moments)
            batches = []
        return _fold_batches(state, batches)


def _fold_batches(state: LayerState, batches: Sequence[Moments]) -> LayerState:
    return state.accumulator.fold_many(state, batches) if batches else state


def _fold_stack(state: LayerState, stack: MomentsStack) -> LayerState:
    try:
        return state.accumulator.fold_stack(state, stack)
    except ProblemError:
        for number, moments in enumerate(stack.rows()):  # again, to name the row
            with in_row(number):
                state = state.accumulator.fold(state, moments)
        raise
