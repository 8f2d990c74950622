"""What a fold folds: a batch that is here, moments whose batch stayed with the caller, or a group of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..engine.moments import Moments, check_enough
from ..engine.normalize import TrainStep, least_values, normalize_with, train_step
from ..engine.state import LayerState
from .computing import Computing


class Work(Protocol):
    """The half of a train call that needs no shared state; it may have to be done again when the layer has changed.

    Attributes:
        basis: the state that it was done under.
        moments: what is to be folded.
    """

    basis: LayerState
    moments: Moments

    async def under(self, state: LayerState) -> None:
        """Do it under this state. Raises `ProblemError` for what that state refuses."""
        ...


class BatchWork:
    """A batch that is normalized with its own statistics.

    Attributes:
        step: its output under `basis`.
    """

    basis: LayerState
    moments: Moments
    step: TrainStep

    def __init__(self, batch: torch.Tensor, computing: Computing) -> None:
        self._batch = batch
        self._computing = computing

    async def under(self, state: LayerState) -> None:
        """See `Work`."""
        self.step = await self._computing.run(self._batch.nbytes, train_step, state, self._batch)
        self.basis, self.moments = state, self.step.moments


class PostedWork:
    """Moments that a caller sent."""

    basis: LayerState

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    async def under(self, state: LayerState) -> None:
        """See `Work`."""
        check_enough(self.moments.count, least_values(state.config), "count")
        if state.config.non_finite == "reject":
            self.moments.check_finite()
        self.basis = state


class Shard:
    """One member's part of a synchronized batch.

    Attributes:
        step: its output under the whole's statistics, once those are known.
    """

    def __init__(self, batch: torch.Tensor, computing: Computing) -> None:
        self.step: TrainStep | None = None
        self._batch = batch
        self._computing = computing

    async def finish(self, state: LayerState, whole: Moments) -> None:
        """Normalize the shard with the statistics of the whole batch."""
        self.step = await self._computing.run(self._batch.nbytes, normalize_with, state, self._batch, whole)


class GroupWork:
    """All shards of a synchronized batch, normalized with the statistics of the whole."""

    basis: LayerState

    def __init__(self, moments: Moments, shards: Sequence[Shard]) -> None:
        self.moments = moments
        self._shards = shards

    async def under(self, state: LayerState) -> None:
        """See `Work`. Every shard is normalized before anything is folded: one that overflows refuses the whole."""
        await PostedWork(self.moments).under(state)
        for shard in self._shards:
            await shard.finish(state, self.moments)
        self.basis = state
