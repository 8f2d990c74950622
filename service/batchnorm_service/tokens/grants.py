"""What a token allows: a scope, and a prefix of layer names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class Scope(IntEnum):
    """What kind of calls a token allows. Each scope includes those before it."""

    READ = 1
    """Calls that change nothing."""
    TRAIN = 2
    """Calls of a training run: creating layers, folding batches, setting tensors."""
    ADMIN = 3
    """All calls."""

    def __str__(self) -> str:
        return self.name.lower()

    @classmethod
    def parse(cls, text: str) -> Scope:
        """The scope with this name. Raises `KeyError`."""
        return {str(scope): scope for scope in cls}[text]


@dataclass(frozen=True, slots=True)
class Grant:
    """What a caller may do.

    Attributes:
        scope: which calls.
        prefix: only layers whose names start with it exist for this caller.
    """

    scope: Scope
    prefix: str = ""

    def sees(self, name: str) -> bool:
        """Whether the layer of this name exists for this caller."""
        return name.startswith(self.prefix)

    def visible_prefix(self, prefix: str) -> str | None:
        """The prefix that names must have to be visible and to start with `prefix`; None if there are no such names.

        Listings use it instead of filtering their pages, whose length and `next` would reveal the other names.
        """
        if prefix.startswith(self.prefix):
            return prefix
        return self.prefix if self.prefix.startswith(prefix) else None


EVERYTHING: Final = Grant(Scope.ADMIN)
