"""Shares of each layer in the running calls and in the event loop: a flood of one layer leaves room for the others."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from batchnorm_client.wire.errors import Overloaded

_SHARE: Final = 8
"""A layer may have up to this many times as many running calls as there are slots left (dynamic thresholds: Choudhury
and Hahne, 1998). One flooded layer leaves a ninth of the slots free; two leave a seventeenth, and share the rest."""

_MIN_SLOTS: Final = 16
"""With fewer slots than this there are no shares: they would be less than one call."""

_CALL_COST: Final = 1 << 15
"""What a call costs besides the bytes of its body, in bytes that take as long."""

REFUSAL_COST: Final = 1 << 14
"""What it costs to refuse a call."""

_BUDGET: Final = 1 << 20
"""What one layer's calls may cost in one turn of the event loop; the others wait for the next turn."""

_SHARED_BUDGET: Final = 1 << 17
"""The same while several layers are in use: less, for shorter turns, although longer ones are more efficient."""

_SHARED_TURNS: Final = 1000
"""For how many turns after a call on another layer than before several layers count as in use."""


def call_cost(size: int) -> int:
    """What a call with a body of this size costs, in bytes."""
    return _CALL_COST + size


def group_share(slots: int) -> int:
    """How many of the running calls may wait for the other members of their groups: as many as one layer may have.

    They may wait for minutes and cost nothing: otherwise a caller who joins groups of several layers, which nobody
    completes, would take all slots.
    """
    return slots if slots < _MIN_SLOTS else slots * _SHARE // (_SHARE + 1)


class CallShares:
    """Limits the running calls, and starts only some of each layer's calls in one turn of the event loop.

    Calls on one layer start in the order of their arrival.

    Args:
        slots: the maximum number of running calls.

    Attributes:
        running: how many calls run now, including those that wait for a turn.
    """

    def __init__(self, slots: int) -> None:
        self.running = 0
        self._slots = slots
        self._by_layer: dict[str | None, int] = {}
        self._spent: dict[str | None, int] = {}
        self._waiting: dict[str | None, deque[tuple[asyncio.Future[None], int]]] = {}
        self._last: str | None = None
        self._shared_turns = 0
        self._turn_ends = False

    def enter(self, layer: str | None) -> Overloaded | None:
        """Count a call as running, or return why it is refused. If it counts, the caller must call `leave`.

        Args:
            layer: None for calls on no layer, or on several.
        """
        count = self._by_layer.get(layer, 0) + 1
        left = self._slots - self.running - 1
        if left < 0 or (count > 1 and count > _SHARE * left and self._slots >= _MIN_SLOTS):
            return self._refusal(layer, everywhere=left < 0)
        self._by_layer[layer] = count
        self.running += 1
        return None

    def leave(self, layer: str | None) -> None:
        """Count a call as finished."""
        self.running -= 1
        left = self._by_layer[layer] - 1
        if left:
            self._by_layer[layer] = left
        else:
            del self._by_layer[layer]

    def may_start(self, layer: str | None, cost: int) -> bool:
        """Whether a call may start in this turn of the event loop; otherwise it has to await `turn`.

        Refusals take turns, too: who calls again at once after each would fill every turn with them.

        Args:
            layer: as above.
            cost: `call_cost`, or `REFUSAL_COST`.
        """
        if not self._turn_ends:
            self._turn_ends = True
            asyncio.get_running_loop().call_soon(self._end_turn)
        if layer != self._last:
            self._last, self._shared_turns = layer, _SHARED_TURNS
        spent = self._spent.get(layer, 0)
        if layer in self._waiting or spent >= self._budget:
            return False
        self._spent[layer] = spent + cost
        return True

    async def turn(self, layer: str | None, cost: int) -> None:
        """Wait for the turn of a call that may not start in this one."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(layer, deque()).append((future, cost))
        await future

    def _refusal(self, layer: str | None, *, everywhere: bool) -> Overloaded:
        what = f"{self.running} calls"
        if not everywhere and layer is not None:
            what = f"{self._by_layer[layer]} of {self._slots} calls on layer {layer!r}"
        return Overloaded(f"{what} are running: BATCHNORM_MAX_CONCURRENT_REQUESTS", retry_after=1)

    @property
    def _budget(self) -> int:
        return _SHARED_BUDGET if self._shared_turns else _BUDGET

    def _end_turn(self) -> None:
        self._spent.clear()
        self._shared_turns -= self._shared_turns > 0
        for layer, waiting in list(self._waiting.items()):
            spent = 0
            while waiting and spent < self._budget:
                future, cost = waiting.popleft()
                if not future.done():
                    future.set_result(None)
                    spent += cost
            self._spent[layer] = spent
            if not waiting:
                del self._waiting[layer]
        self._turn_ends = bool(self._spent)
        if self._turn_ends:
            asyncio.get_running_loop().call_soon(self._end_turn)
