"""How a committer behaves while other processes commit to the same layer: everyone gets a turn, and groups grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

_LONGEST: Final = 0.2  # seconds
_SHORTEST: Final = 0.0001  # seconds: of a turn, however coarse the clock
_MOST: Final = 16.0  # competing processes that are guessed
_SHARE: Final = 0.2  # of the newest measurement in the running mean
_KEPT: Final = 0.875  # of a guess, each time that nothing speaks for it


class ContentionBackoff:
    """How long whoever has won a race for a layer gives way.

    The winner knows the new state at once and would win the next race, too, while the others still learn of it. So it
    lets those go first that have lost meanwhile, a turn for each of them; what arrives in that time is folded in one
    commit. Who has lost tries again at once: it is that try that tells the winner. Alone, nobody ever waits.
    """

    def __init__(self) -> None:
        self._guess = 0.0
        self._turn = 0.0
        self._absent = 0  # of those that wait, as the store says, so many let their turns pass

    def took(self, seconds: float) -> None:
        """Note how long a turn was, from a known state to the answer of the store, which may have been away."""
        self._turn += (min(seconds, _LONGEST) - self._turn) * (_SHARE if self._turn else 1)

    def pauses(self, told: int | None, losses: int, passed: Callable[[], int]) -> Iterator[float]:
        """Seconds to wait before the next commit, and to wait again: those that lost may be farther from the store.

        Args:
            told: how many have lost and wait, as the store says; None: it does not know. Then there are about as many
                as this one has lost to, and they are forgotten slowly: whoever is starved commits nothing.
            losses: how many races this commit had lost before it won.
            passed: how many commits others have made since.
        """
        if told is None:
            self._guess = max(min(losses, _MOST), self._guess * _KEPT if self._guess > 0.1 else 0.0)
            if self._guess:
                yield min(self._guess * self._turn, _LONGEST)
            return
        # One that died, or gave up, is told of until the store forgets it, but waited for only once.
        self._absent = min(self._absent, told)
        left, turn = _LONGEST, max(self._turn, _SHORTEST)
        while (backoff := told - self._absent - (seen := passed())) > 0 and left > 0:
            seconds = min(backoff * turn, left)
            yield seconds
            left -= seconds
            turn *= 2
        if seen:
            self._absent = 0
        elif left <= 0:
            self._absent = told
