"""Where the moments of an update come from: a batch, a caller that sends moments, or all shards of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from batchnorm_client.kernels.checks import check_enough, least_values

from ..engine.moments import Extremes, Moments
from ..engine.normalize import Frozen, TrainStep, check_whole, frozen, train_step
from ..engine.state import LayerState
from .compute import ComputeExecutor


class MomentsSource(Protocol):
    """The half of a train call that needs no shared state; it may have to be done again when the layer has changed.

    Attributes:
        basis: the state that it was done under.
        moments: what is to be folded.
        payload: what the fold's receipt says beside the numbers.
    """

    basis: LayerState
    moments: Moments
    payload: bytes

    async def under(self, state: LayerState) -> None:
        """Do it under this state. Raises `ProblemError` for what that state refuses."""
        ...


class BatchSource:
    """A batch that is normalized with its own statistics."""

    basis: LayerState
    moments: Moments
    payload = b""

    def __init__(self, batch: torch.Tensor, executor: ComputeExecutor) -> None:
        self._step: TrainStep | None = None
        self._batch = batch
        self._executor = executor

    async def output(self, state: LayerState) -> TrainStep:
        """The batch as this state normalizes it, once it is folded.

        If that is not as when it was folded, it was so by an earlier call of which this is a repeat; what the state
        would refuse by now is then no matter.
        """
        if self._step is not None and state.normalizes_like(self.basis):
            return self._step
        tolerant = state._replace(config=state.config.model_copy(update={"non_finite": "allow"}))
        return await self._executor.run(self._batch.nbytes, train_step, tolerant, self._batch)

    async def under(self, state: LayerState) -> None:
        """See `MomentsSource`."""
        self._step = await self._executor.run(self._batch.nbytes, train_step, state, self._batch)
        self.basis, self.moments = state, self._step.moments


class PostedSource:
    """Moments that a caller sent."""

    basis: LayerState
    payload = b""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    async def under(self, state: LayerState) -> None:
        """See `MomentsSource`."""
        check_enough(self.moments.count, least_values(state.config), "count")
        if state.config.non_finite == "reject":
            self.moments.check_finite("mean", "var")
        self.basis = state


class GroupSource:
    """All shards of a synchronized batch; each will be normalized where it came to."""

    basis: LayerState
    payload: bytes

    def __init__(self, moments: Moments, extremes: Extremes, payload: Callable[[Frozen], bytes]) -> None:
        self.moments = moments
        self._extremes = extremes
        self._payload = payload

    async def under(self, state: LayerState) -> None:
        """See `MomentsSource`. An output that would overflow, in whichever shard, refuses the whole."""
        check_whole(state, self.moments, self._extremes)
        self.basis, self.payload = state, self._payload(frozen(state))
