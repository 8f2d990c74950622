"""A row of the table: what was measured, how much it varied, and what it should be."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

DISTURBED = 0.3


@dataclass(frozen=True)
class Target:
    """What a figure should be.

    Attributes:
        bound: the limit.
        least: whether the figure should be at least that; otherwise at most.
        unit: after the figures: nothing for ratios.
    """

    bound: float
    least: bool = True
    unit: str = ""

    def __str__(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.bound:g}{self.unit}"

    def met(self, value: float) -> bool:
        """Whether that is good enough."""
        return value >= self.bound if self.least else value <= self.bound


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: was measured.
        target: what it should be.
        values: one per round.
        note: the figures behind it.
    """

    what: str
    target: Target
    values: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        """The figure."""
        return statistics.median(self.values)

    @property
    def disturbed(self) -> bool:
        """Whether the rounds differ so much that something else must have used the machine."""
        return max(self.values) - min(self.values) > DISTURBED * self.median

    def __str__(self) -> str:
        unit = self.target.unit
        verdict = "yes" if self.target.met(self.median) else "**no**"
        spread = f"{min(self.values):.3g} to {max(self.values):.3g}{' (disturbed)' if self.disturbed else ''}"
        return f"| {self.what} | {self.target} | {self.median:.3g}{unit} | {spread} | {verdict} | {self.note} |"


HEAD = "| what | target | median | spread | met | behind it |\n|---|---|---|---|---|---|"


def in_turns(rounds: int, ours: Callable[[], T], theirs: Callable[[], T]) -> list[tuple[T, T]]:
    """Both sides measured one right after the other, so often; what disturbs one disturbs the other."""
    return [(ours(), theirs()) for _ in range(rounds)]


def ratio(what: str, target: Target, pairs: list[tuple[float, float]], unit: str = "/s", scale: float = 1) -> Row:
    """The row of what `in_turns` measured."""
    ours, theirs = (statistics.median(side) * scale for side in zip(*pairs, strict=True))
    note = f"{_short(ours)} to {_short(theirs)}{unit}"
    return Row(what, target, tuple(a / b for a, b in pairs), note)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
