"""One call that counts as running, by whichever way its request came."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from batchnorm_client.wire.errors import Overloaded

from .shares import REFUSAL_COST, CallShares


class RunningCall:
    """A call that is about to run, or runs.

    Args:
        shares: which calls may run.
        layer: that it is for; None for calls on several layers.
        counted: whether it counts. Calls that are not below /v1 or the like do not.

    Attributes:
        began: when it started to run, by `time.perf_counter`; later by as long as it has waited for a change.
        refusal: why it may not run.
    """

    __slots__ = ("_counted", "_layer", "_running", "_shares", "began", "refusal")

    def __init__(self, shares: CallShares, layer: str | None, *, counted: bool = True) -> None:
        self.began = time.perf_counter()
        self.refusal: Overloaded | None = None
        self._shares = shares
        self._layer = layer
        self._counted = counted
        self._running = False

    def enter(self) -> None:
        """Count it as running, or set `refusal`."""
        if self._counted and not self._running:
            self.refusal = self._shares.enter(self._layer)
            self._running = self.refusal is None

    async def start(self, cost: int, *, waits: bool = False) -> None:
        """Start to run when it is its layer's turn; a refusal takes a turn, too.

        Args:
            cost: `call_cost`.
            waits: whether it may wait for a change. Such a call counts from its turn on only: thousands ask at once
                after each change, and must not be refused because of each other. Any other was entered before.

        Raises:
            Overloaded: it may not run.
        """
        if not self._counted:
            return
        if self.refusal is not None:
            cost = REFUSAL_COST
        if not self._shares.may_start(self._layer, cost):
            await self._shares.turn(self._layer, cost)
        if waits:
            self.enter()
        if self.refusal is not None:
            raise self.refusal

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While it waits for a change, it does not count as running, and the time is not reported as its own."""
        self.leave()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - began

    def leave(self) -> None:
        """It runs no longer, and never again. May be called several times."""
        self._counted = False
        if self._running:
            self._running = False
            self._shares.leave(self._layer)
