"""`DriftHistory`: a layer's drift over time, in a bounded number of columns, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from batchnorm_client.wire.tensors import Tensor

from ..engine.drift import Drift

COLUMNS: Final = 96
GROUPS: Final = 48
"""Layers with more channels have this many groups of neighbouring channels, or half as many."""

FIRST_STEP: Final = 5.0
LAST_STEP: Final = 1280.0
"""Seconds that a column stands for: at first the one, doubled whenever there is no room, until the other; then the
oldest columns go, so there is more than a day."""

_SHIFT_STEPS: Final = 12.0
_MOST_STEPS: Final = 127

Numbers = npt.NDArray[Any]


class DriftHistory(NamedTuple):
    """The drift over time. What is between two columns is in the later one, as its largest values.

    Attributes:
        step: seconds that a column stands for at least.
        times: (K,) float64: when each column began, in seconds since 1970, ascending; K <= `COLUMNS`.
        scores: (K,) float32: the largest score.
        shifts: (K, G) int8: the z that is farthest from 0, of each group of neighbouring channels, in twelfths.
    """

    step: float
    times: Numbers
    scores: Numbers
    shifts: Numbers

    def then(self, drift: Drift, now: datetime) -> DriftHistory:
        """The history with the present drift, in the last column or in a new one."""
        at, shifts = now.timestamp(), _grouped(drift.z)
        if len(self.times) and at - self.times[-1] < self.step:
            scores = self.scores.copy()
            scores[-1] = max(scores[-1], drift.score)
            last = _farther(self.shifts[-1:], shifts)
            return self._replace(scores=scores, shifts=np.concatenate([self.shifts[:-1], last]))
        kept = self._with_room()
        return DriftHistory(
            kept.step,
            np.append(kept.times, at),
            np.append(kept.scores, np.float32(drift.score)),
            np.concatenate([kept.shifts, shifts]),
        )

    def _with_room(self) -> DriftHistory:
        if len(self.times) < COLUMNS:
            return self
        if 2 * self.step > LAST_STEP:
            return DriftHistory(self.step, self.times[1:], self.scores[1:], self.shifts[1:])
        scores = np.maximum(self.scores[::2], self.scores[1::2])
        return DriftHistory(2 * self.step, self.times[::2], scores, _farther(self.shifts[::2], self.shifts[1::2]))

    def tensors(self) -> dict[str, Tensor]:
        """The numbers, to be stored under these names."""
        return {
            "history_times": Tensor.of(np.append(self.times, self.step)),
            "history_scores": Tensor.of(np.ascontiguousarray(self.scores)),
            "history_shifts": Tensor.of(np.ascontiguousarray(self.shifts)),
        }


def no_history(channels: int) -> DriftHistory:
    """The history of a layer that nobody has used."""
    groups = -(-channels // group_size(channels))
    return DriftHistory(FIRST_STEP, np.zeros(0), np.zeros(0, np.float32), np.zeros((0, groups), np.int8))


def read_history(tensors: Mapping[str, Tensor], channels: int) -> DriftHistory:
    """The inverse of `DriftHistory.tensors`. None is there where an older release has written."""
    nothing = no_history(channels)
    if "history_times" not in tensors:
        return nothing
    times = tensors["history_times"].numpy().astype(np.float64)
    scores = tensors["history_scores"].numpy().astype(np.float32)
    shifts = tensors["history_shifts"].numpy().astype(np.int8)
    fits = 1 <= len(times) <= COLUMNS + 1 and scores.shape == times[1:].shape
    if not fits or shifts.shape != (len(scores), nothing.shifts.shape[1]):
        return nothing
    return DriftHistory(float(times[-1]), times[:-1], scores, shifts)


def group_size(channels: int) -> int:
    """How many neighbouring channels a group has; the last one may have fewer."""
    return -(-channels // GROUPS)


def shift_of(shifts: Numbers) -> Numbers:
    """z of stored shifts."""
    return shifts.astype(np.float32) / np.float32(_SHIFT_STEPS)


def _grouped(z: Numbers) -> Numbers:
    """The z that is farthest from 0 in each group, (1, G)."""
    starts = np.arange(0, len(z), group_size(len(z)))
    low, high = np.minimum.reduceat(z, starts), np.maximum.reduceat(z, starts)
    farthest = np.where(-low > high, low, high)
    return np.clip(np.rint(farthest * _SHIFT_STEPS), -_MOST_STEPS, _MOST_STEPS).astype(np.int8)[None]


def _farther(a: Numbers, b: Numbers) -> Numbers:
    """Of both, element by element, what is farther from 0."""
    return np.where(np.abs(b.astype(np.int16)) > np.abs(a.astype(np.int16)), b, a).astype(np.int8)
