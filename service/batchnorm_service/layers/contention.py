"""Backoff while several processes commit to the same layer, so that each gets its turn and commits get larger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

_MAX_PAUSE: Final = 0.2  # seconds
_MIN_COMMIT_SECONDS: Final = 0.0001  # a coarse clock may measure 0
_MAX_ESTIMATE: Final = 16.0
_SMOOTHING: Final = 0.2  # weight of a new measurement in the moving average
_DECAY: Final = 0.875


class ContentionBackoff:
    """Pauses after a commit that won against competing processes.

    The winner knows the new state first and would also win the next race. So it pauses for the time of one commit per
    process that lost; updates that arrive meanwhile share its next commit. Losers retry at once, and the store counts
    them (`Committed.contenders`). Without competition there is no pause.
    """

    def __init__(self) -> None:
        self._estimate = 0.0  # of competing processes, for stores that do not count them
        self._commit_seconds = 0.0  # moving average
        self._absent = 0  # contenders that did not commit during an earlier pause

    def record_duration(self, seconds: float) -> None:
        """Add a commit's duration to the average. It is capped, as it may include an outage of the store."""
        weight = _SMOOTHING if self._commit_seconds else 1
        self._commit_seconds += (min(seconds, _MAX_PAUSE) - self._commit_seconds) * weight

    def pauses(self, contenders: int | None, losses: int, commits: Callable[[], int]) -> Iterator[float]:
        """Seconds to pause before the next commit. There may be several pauses, as contenders may have slower links.

        Args:
            contenders: how many commits lost and are being retried, by the store's count. None: it does not count; then
                the number is estimated from `losses`, with a slow decay, because a starved process commits nothing.
            losses: how many races this commit lost before it won.
            commits: returns how many commits others have made since.
        """
        if contenders is None:
            self._estimate = max(min(losses, _MAX_ESTIMATE), self._estimate * _DECAY if self._estimate > 0.1 else 0.0)
            if self._estimate:
                yield min(self._estimate * self._commit_seconds, _MAX_PAUSE)
            return
        # A process that died or gave up counts as a contender until the store forgets it; wait for it only once.
        self._absent = min(self._absent, contenders)
        left, turn = _MAX_PAUSE, max(self._commit_seconds, _MIN_COMMIT_SECONDS)
        while (waiting := contenders - self._absent - (seen := commits())) > 0 and left > 0:
            seconds = min(waiting * turn, left)
            yield seconds
            left -= seconds
            turn *= 2
        if seen:
            self._absent = 0
        elif left <= 0:
            self._absent = contenders
