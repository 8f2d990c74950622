"""How a committer behaves while other processes commit to the same layer: everyone gets a turn, and groups grow."""

from __future__ import annotations

import random
from typing import Final

_MOST: Final = 16.0
_LONGEST: Final = 0.05  # seconds
_SHARE: Final = 0.2  # of the newest measurement in the running mean


class Rivals:
    """About how many others race for a layer, reckoned from what they commit.

    The winner of a race knows the new state at once and would win the next one, too, while the others still learn of
    it. So whoever has won, and has lost lately, lets the others go first, about one round trip for each of them; what
    arrives meanwhile is folded in the same commit. Alone, nobody ever waits.
    """

    def __init__(self) -> None:
        self._count = 0.0
        self._trip = 0.0

    def took(self, seconds: float) -> None:
        """Note how long a commit took."""
        self._trip += (seconds - self._trip) * (_SHARE if self._trip else 1)

    def lost(self) -> None:
        """Another process was faster."""
        self._count = min(self._count + 1, _MOST)

    def passed(self, commits: int) -> None:
        """Note how many commits others made in a turn of theirs: one each, if everybody gives way like this.

        Few are believed slowly: whoever is starved commits nothing, and would be forgotten by the one that starves it.
        """
        seen = min(max(commits, 0), _MOST)
        self._count += (seen - self._count) / (2 if seen > self._count else 8)
        if self._count < 0.1:  # winning alone would not tell: maybe nobody else can
            self._count = 0.0

    def after_winning(self) -> float:
        """Seconds to wait before the next commit: about a turn for each rival. 0 when there is none."""
        return min(self._count * self._trip * random.uniform(0.5, 1.5), _LONGEST)  # noqa: S311

    def after_losing(self) -> float:
        """Seconds to wait after races lost in a row: part of a round trip, so that whoever has won waits longer."""
        return min(self._trip * random.uniform(0, 0.5), _LONGEST)  # noqa: S311
