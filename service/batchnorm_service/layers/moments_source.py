"""Sources of the moments that an update folds: a batch, moments sent by the caller, or the shards of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from batchnorm_client.kernels.checks import check_enough, least_values

from ..engine.moments import Extremes, Moments
from ..engine.normalize import OutputParameters, TrainStep, check_whole, output_parameters, train_step
from ..engine.state import LayerState
from .compute import ComputeExecutor


class MomentsSource(Protocol):
    """Computes the moments to fold, without shared state; again if the layer's parameters or config have changed.

    Attributes:
        basis: the state for which `compute` last ran.
        moments: the moments to fold.
        payload: the payload of the fold's receipt.
    """

    basis: LayerState
    moments: Moments
    payload: bytes

    async def compute(self, state: LayerState) -> None:
        """Compute them for this state of the layer. Raises `ProblemError` if it refuses the batch."""
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


class PostedSource:
    """Moments that a caller sent."""

    basis: LayerState
    payload = b""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    async def compute(self, state: LayerState) -> None:
        """See `MomentsSource`."""
        check_enough(self.moments.count, least_values(state.config), "count")
        if state.config.non_finite == "reject":
            self.moments.check_finite("mean", "var")
        self.basis = state


class GroupSource:
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
