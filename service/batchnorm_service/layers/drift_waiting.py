"""`Waiting`: what a process measured of a layer and has not saved yet."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from ..engine.drift import FULL_VALUES, Measured, Smoothed, nothing, smooth, unjoined

_MAX_BATCHES: Final = 512
_MAX_BYTES: Final = 1 << 20
_LEAST_BATCHES: Final = 4
"""Of a layer as many batches wait as take `_MAX_BYTES`, but so many at least and at most. If more come, the oldest are
left out: what is smoothed has forgotten them soon anyway."""


Origin = tuple[int, str]
"""The incarnation of a layer and the origin of its statistics: see `CommittedLayer`. None stands for a kept state's."""


class Taken(NamedTuple):
    """Batches that are to be saved.

    Attributes:
        measured: the batches, each with the origin of the statistics that it was compared with.
        left_out: how many batches were left out before these.
        weight: of those, as full batches.
    """

    measured: tuple[tuple[Origin | None, Measured], ...] = ()
    left_out: int = 0
    weight: float = 0.0

    def smoothed(self, origin: Origin, channels: int) -> Smoothed:
        """The sums over those that were compared with statistics of this origin, or with a kept state."""
        measured = [each for of, each in self.measured if of in (None, origin) and each.mean.shape[1] == channels]
        sums = smooth(measured) if measured else nothing(channels)
        recent, folded = sums.passed
        return sums._replace(batches=sums.batches + self.left_out, passed=(recent + self.weight, folded))

    @property
    def nbytes(self) -> int:
        """The size of the numbers."""
        return sum(each.nbytes for _, each in self.measured)


class Waiting:
    """What was measured of a layer and is not saved yet.

    Attributes:
        sampled: when a batch of eval was measured last.
        saved: when it was saved last.
        due: whether there is something to be saved.
        restarted: whether it has to be saved that nothing measured before counts any more.
        number: how many batches were added so far.
        lock: held while it is saved, or read together with what is saved.
    """

    def __init__(self, channels: int) -> None:
        self.sampled = self.saved = -math.inf
        self.due = self.restarted = False
        self.number = 0
        self.lock = asyncio.Lock()
        self._most = max(_LEAST_BATCHES, min(_MAX_BATCHES, _MAX_BYTES // (16 * channels)))
        self._measured: deque[tuple[Origin | None, Measured]] = deque()
        self._batches = 0  # in `_measured`
        self._left_out, self._weight = 0, 0.0

    def add(self, origin: Origin | None, measured: Iterable[Measured]) -> None:
        """Add batches, compared with statistics of this origin."""
        for each in measured:
            self._measured.append((origin, each))
            self._batches += len(each.counts)
            self.number += len(each.counts)
        self._leave_out()

    @property
    def all(self) -> Taken:
        """What waits. It goes on waiting."""
        return Taken(tuple(self._measured), self._left_out, self._weight)

    def take(self, *, unfinished: bool) -> Taken:
        """What waits. Unless `unfinished`, small batches go on waiting that are to be joined with the next."""
        taken, kept = self.all, 0 if unfinished else unjoined([each for _, each in self._measured])
        measured = taken.measured
        self._measured = deque(measured[len(measured) - kept :])
        self._batches, self._left_out, self._weight = kept, 0, 0.0
        return taken._replace(measured=measured[: len(measured) - kept])

    def put_back(self, taken: Taken) -> None:
        """What was taken could not be saved: it waits again, before what came meanwhile."""
        self._measured.extendleft(reversed(taken.measured))
        self._batches += sum(len(each.counts) for _, each in taken.measured)
        self._left_out += taken.left_out
        self._weight += taken.weight
        self._leave_out()

    def _leave_out(self) -> None:
        while self._batches > self._most:
            origin, first = self._measured.popleft()
            surplus = min(self._batches - self._most, len(first.counts))
            if surplus < len(first.counts):
                self._measured.appendleft((origin, first.after(surplus)))
            self._batches -= surplus
            self._left_out += surplus
            self._weight += sum(min(count / FULL_VALUES, 1.0) for count in first.counts[:surplus])
