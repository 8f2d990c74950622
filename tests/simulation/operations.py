"""What clients did: each operation with its times and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batchnorm_client.wire.errors import BatchNormError

_SHOWN = ("key", "group", "what", "changes", "tag", "at", "to", "with_pins")


@dataclass(slots=True, eq=False)
class Operation:
    """A call of a client.

    Attributes:
        kind: the client's method, such as train or reset; eval_at is eval of a kept state; that of a follower is such
            as follower.eval.
        layer: its name.
        arguments: batch, key, changes and so on.
        began, ended: seconds; `ended` is infinite as long as the call is under way.
        result: of a call that returned.
        error: of one that raised.
        gave_up: it was cancelled.
    """

    kind: str
    layer: str
    arguments: dict[str, Any]
    began: float
    ended: float = float("inf")
    result: Any = None
    error: BatchNormError | None = None
    gave_up: bool = False

    @property
    def acknowledged(self) -> bool:
        """Whether the caller was told that it took effect."""
        return self.error is None and not self.gave_up and self.ended < float("inf")

    @property
    def refused(self) -> bool:
        """Whether the caller was told that it had no effect."""
        return self.error is not None and not self.error.outcome_unknown

    def __str__(self) -> str:
        what = "gave up" if self.gave_up else "returned" if self.acknowledged else type(self.error).__name__
        if self.ended == float("inf"):
            what = "did not return"
        shown = {name: value for name, value in self.arguments.items() if name in _SHOWN}
        return f"{self.began:9.4f} to {self.ended:9.4f}  {self.kind} {self.layer} {shown or ''} {what}"


@dataclass(slots=True)
class Script:
    """What a client will do, drawn before the world begins, so that a shorter one can be tried.

    Attributes:
        steps: pause in seconds, kind, layer, arguments.
    """

    steps: list[tuple[float, str, str, dict[str, Any]]] = field(default_factory=list)
