"""Sources of the moments that an update folds: a batch, moments sent by the caller, or the shards of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from batchnorm_client.wire.errors import InvalidRequest

from ..engine.moments import Extremes, Moments
from ..engine.moments_stack import MomentsStack
from ..engine.normalize import (
    OutputParameters,
    TrainStep,
    batch_moments,
    check_whole,
    output_parameters,
    train_step,
)
from ..engine.posted import Posted, check_posted
from ..engine.state import LayerState
from .compute import ComputeExecutor


class MomentsSource(Protocol):
    """Computes the moments to fold, without shared state; again if the layer's parameters or config have changed.

    Attributes:
        basis: the state for which `compute` last ran.
        payload: the payload of the fold's receipt.
    """

    basis: LayerState
    payload: bytes

    @property
    def moments(self) -> Posted:
        """The moments to fold, of a batch or a stack of batches."""
        ...

    def folded(self, state: LayerState) -> None:
        """Take the state right after this fold, if `needs_state`. Called again when the commit has to be repeated."""
        ...

    @property
    def needs_state(self) -> bool:
        """Whether `folded` has to be called."""
        ...

    async def compute(self, state: LayerState) -> None:
        """Compute them for this state of the layer. Raises `ProblemError` if it refuses the batch."""
        ...


class _NeedsNoState:
    """A source for which the state after its fold does not matter."""

    needs_state = False

    def folded(self, _state: LayerState) -> None:
        """See `MomentsSource`."""


class BatchSource(_NeedsNoState):
    """A batch that is normalized with its own statistics."""

    basis: LayerState
    moments: Moments
    payload = b""

    def __init__(self, batch: torch.Tensor, executor: ComputeExecutor) -> None:
        self._step: TrainStep | None = None
        self._batch = batch
        self._executor = executor

    async def output(self, state: LayerState) -> TrainStep:
        """The batch normalized by the state that it was folded into.

        That state differs from `basis` only if an earlier call with the same key folded the batch. Then the checks for
        non-finite values are skipped, since the batch has been accepted already.
        """
        if self._step is not None and state.normalizes_like(self.basis):
            return self._step
        tolerant = state._replace(config=state.config.model_copy(update={"non_finite": "allow"}))
        return await self._executor.run(self._batch.nbytes, train_step, tolerant, self._batch)

    async def compute(self, state: LayerState) -> None:
        """See `MomentsSource`."""
        self._step = await self._executor.run(self._batch.nbytes, train_step, state, self._batch)
        self.basis, self.moments = state, self._step.moments


class ObservedSource:
    """A batch that is normalized with the running statistics right after its own fold.

    Attributes:
        batch: the batch.
        after: the state right after the fold.
    """

    basis: LayerState
    moments: Moments
    after: LayerState
    payload = b""
    needs_state = True

    def __init__(self, batch: torch.Tensor, executor: ComputeExecutor) -> None:
        self.batch = batch
        self._executor = executor

    def folded(self, state: LayerState) -> None:
        """See `MomentsSource`."""
        self.after = state

    async def compute(self, state: LayerState) -> None:
        """See `MomentsSource`."""
        if not state.tracks:
            raise InvalidRequest(
                "normalize=running needs running statistics, and the layer tracks none",
                field="normalize",
                expected="batch",
                got="running",
            )
        self.moments = await self._executor.run(self.batch.nbytes, batch_moments, state, self.batch)
        self.basis = state


class PostedSource(_NeedsNoState):
    """Moments that a caller sent."""

    basis: LayerState
    payload = b""

    def __init__(self, moments: Posted, executor: ComputeExecutor) -> None:
        self.moments = moments
        self._executor = executor

    async def compute(self, state: LayerState) -> None:
        """See `MomentsSource`."""
        cost = self.moments.cost if isinstance(self.moments, MomentsStack) else 0
        await self._executor.run_codec(cost, check_posted, state.config, self.moments)
        self.basis = state


class GroupSource(_NeedsNoState):
    """The merged shards of a synchronized batch. Each shard is normalized by the replica that received it."""

    basis: LayerState
    payload: bytes

    def __init__(self, moments: Moments, extremes: Extremes, payload: Callable[[OutputParameters], bytes]) -> None:
        self.moments = moments
        self._extremes = extremes
        self._payload = payload

    async def compute(self, state: LayerState) -> None:
        """See `MomentsSource`. Refuses the whole batch if the output of any shard would overflow."""
        check_whole(state, self.moments, self._extremes)
        self.basis, self.payload = state, self._payload(output_parameters(state))
