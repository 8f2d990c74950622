"""How often something may happen in a second."""

from __future__ import annotations

import time


class Budget:
    """Allows so many events in each second.

    Args:
        per_second: how many.

    Attributes:
        refused: how many were refused since this was last set to 0.
    """

    __slots__ = ("_ends", "_left", "_per_second", "refused")

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._left = 0
        self._ends = 0.0
        self.refused = 0

    def take(self) -> bool:
        """Whether an event is allowed now; then it is counted."""
        if not self._left:
            now = time.monotonic()
            if now < self._ends:
                self.refused += 1
                return False
            self._left, self._ends = self._per_second, now + 1.0
        self._left -= 1
        return True
