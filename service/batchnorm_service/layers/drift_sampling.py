"""Which of the batches that are only normalized are measured: as many as fit into a share of the process's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

CALL_SECONDS: Final = 60e-6
BYTE_SECONDS: Final = 1e-9
"""About how long measuring a batch takes. It is not measured, because a thread that does not run uses no time."""

_MOST_SECONDS: Final = 0.1
"""How much of the share is saved up while few batches come: about 1,500 small ones are then measured in a row."""

_BUSY_SECONDS: Final = 1.0


class Sampling:
    """A budget of time for measuring batches.

    Half of what was saved up is for layers of which none was measured for a second, so that a layer with many calls
    does not take it all.

    Args:
        share: of the process's time.
        now: a monotonic clock.
    """

    __slots__ = ("_at", "_left", "_now", "_share")

    def __init__(self, share: float, now: Callable[[], float]) -> None:
        self._share = share
        self._now = now
        self._left = _MOST_SECONDS if share else -1.0
        self._at = now()

    def take(self, nbytes: int, last: float) -> float | None:
        """Whether a batch of this size is measured; then what it takes is used up.

        Args:
            nbytes: of the batch.
            last: what this returned when a batch of the same layer was measured last.

        Returns:
            The time; None if the batch is not measured.
        """
        now = self._now()
        self._left = left = min(_MOST_SECONDS, self._left + (now - self._at) * self._share)
        self._at = now
        if left <= (_MOST_SECONDS / 2 if now - last < _BUSY_SECONDS else 0.0):
            return None
        self._left = left - CALL_SECONDS - nbytes * BYTE_SECONDS
        return now
