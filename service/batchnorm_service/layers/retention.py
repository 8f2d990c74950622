"""Which states of a layer are kept when a commit replaces them."""

from __future__ import annotations

from typing import NamedTuple

from ..engine.state import LayerState
from ..runtime import Runtime
from .records import CommittedLayer, now


class Retention(NamedTuple):
    """Keeps the state before each change, and while batches come, one state in `seconds`.

    Attributes:
        length: how many kept states stay, besides pinned ones; 0 keeps none.
        seconds: between two kept states while batches come.
    """

    length: int
    seconds: float

    def next(
        self, runtime: Runtime, layer: CommittedLayer, state: LayerState, operation: str, *, frequent: bool
    ) -> tuple[CommittedLayer, int]:
        """The layer after a commit of `state`, and the argument `keep` of that commit.

        Args:
            runtime: clock and random numbers.
            layer: the state that the commit replaces.
            state: the new one.
            operation: what made it.
            frequent: whether it may come as often as batches do; then `seconds` applies.
        """
        at = now(runtime)
        # A clock that was set back must not stop the history until it has caught up.
        recent = 0 <= (at - layer.kept_at).total_seconds() < self.seconds
        keeps = self.length > 0 and not (frequent and recent)
        stamp = layer.stamp.next(runtime.bits(63))
        kept_at = at if keeps else layer.kept_at
        is_set = operation != "train" and state.running_mean is not layer.state.running_mean
        origin = f"{operation} {stamp.tag}" if is_set else layer.origin
        after = CommittedLayer(stamp, state, layer.created_config, layer.created_at, at, operation, kept_at, origin)
        return after, self.length if keeps else 0
