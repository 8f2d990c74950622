"""Normalizing a batch in the client, with the layer's state from the service; the batch is not sent.

    output = (input - mean) / sqrt(var + eps) * weight + bias

per channel (Ioffe & Szegedy 2015). torch tensors are normalized by torch's kernels, as in the service; numpy arrays by
numpy, which rounds in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final, Generic, NamedTuple, Protocol, cast

import numpy as np

from batchnorm_client.arrays import A
from batchnorm_client.kernels import numpy as numpy_kernels
from batchnorm_client.kernels.checks import check_enough, check_input, least_values
from batchnorm_client.kernels.moments import BatchMoments
from batchnorm_client.kernels.state import LocalState
from batchnorm_client.results import BatchStatistics, EvalResult, FoldResult, TrainResult
from batchnorm_client.wire.errors import NonFinite, UnexpectedAnswer

_MAX: Final = {name: float(np.finfo(name).max) for name in ("float32", "float64")}


class Step(NamedTuple, Generic[A]):
    """A batch that was normalized in the client.

    Attributes:
        output: as the input in kind, shape, dtype and device.
        moments: to be folded.
        statistics: returns what it was normalized with, in the layer's dtype.
    """

    output: A
    moments: BatchMoments
    statistics: Callable[[], tuple[A, A, A]]


class Kernels(Protocol):
    """The arithmetic for one type of array. The batch has its channels on axis 1, fits the layer and is not empty."""

    def with_own_statistics(
        self, state: LocalState, batch: Any
    ) -> tuple[Any, BatchMoments, Callable[[], tuple[Any, Any, Any]]]:
        """Normalize with the batch's own statistics: output; moments; a function that returns the statistics."""
        ...

    def with_statistics(self, state: LocalState, batch: Any, mean: Any, var: Any) -> Any:
        """Normalize with this mean and biased variance."""
        ...

    def statistics(self, state: LocalState, batch: Any, mean: Any, var: Any) -> tuple[Any, Any, Any]:
        """What `with_statistics` normalizes with: mean, biased variance and inverse deviation."""
        ...

    def moments(self, batch: Any) -> BatchMoments:
        """Exact moments, in float64."""
        ...

    def move(self, batch: Any, source: int, destination: int) -> Any:
        """Move an axis: a view."""
        ...

    def clip(self, batch: Any, bound: float) -> Any:
        """Clamp to [-bound, bound]."""
        ...

    def all_finite(self, batch: Any) -> bool:
        """Whether it contains neither NaN nor infinity."""
        ...


def train_step(state: LocalState, batch: A, *, differentiable: bool = False) -> Step[A]:
    """Normalize with the batch's own statistics. Changes nothing.

    Args:
        state: config, weight and bias.
        batch: numpy or torch.
        differentiable: whether gradients flow through the output, with torch, as they do with its own function.

    Raises:
        ShapeMismatch, DtypeMismatch: the batch does not fit the layer.
        TooFewValues: fewer than two values per channel; for population statistics, none.
        NonFinite: NaN, infinity or overflow, and the layer rejects that.
    """
    kernels, moved = _ready(state, batch, differentiable=differentiable)
    check_enough(_values(state, batch), least_values(state.config))
    output, moments, statistics = kernels.with_own_statistics(state, moved)
    return _step(state, kernels, output, moments, statistics)


def shard_moments(state: LocalState, batch: A) -> BatchMoments:
    """The moments of a shard of a synchronized batch, in float64; it may be empty."""
    kernels, moved = _ready(state, batch)
    return kernels.moments(moved)


def observed_moments(state: LocalState, batch: A) -> BatchMoments:
    """The moments of a batch that is to be folded, in float64.

    Raises:
        As `train_step`.
    """
    kernels, moved = _ready(state, batch)
    check_enough(_values(state, batch), least_values(state.config))
    moments = kernels.moments(moved)
    _check_finite(state, moments)
    return moments


def shard_step(state: LocalState, batch: A, whole: BatchMoments) -> Step[A]:
    """Normalize a shard with the statistics of the whole batch.

    Raises:
        NonFinite: the output has NaN or infinity, and the layer rejects that. The whole batch was folded.
    """
    kernels, moved = _ready(state, batch)
    output = kernels.with_statistics(state, moved, whole.mean, whole.var)
    return _step(state, kernels, output, whole, lambda: kernels.statistics(state, moved, whole.mean, whole.var))


def trained(state: LocalState, batch: A, step: Step[A] | None, done: FoldResult, *, statistics: bool) -> TrainResult[A]:
    """The result of a train call, after the moments of the batch, or of all shards of its group, were folded."""
    if step is None:
        if done.count is None or done.mean is None or done.var is None:
            raise UnexpectedAnswer("an answer to a shard without the moments of the whole", status=200)
        step = shard_step(state, batch, BatchMoments(done.count, done.mean, done.var))
    return TrainResult(
        step.output,
        done.version,
        done.num_batches_tracked,
        done.replayed,
        BatchStatistics(*step.statistics()) if statistics else None,
    )


def eval_step(state: LocalState, batch: A, *, statistics: bool, differentiable: bool = False) -> EvalResult[A]:
    """Normalize with the running statistics, or with the batch's own if the layer has none.

    Args:
        state: of the layer.
        batch: numpy or torch.
        statistics: whether to return them.
        differentiable: as for `train_step`.

    Raises:
        ShapeMismatch, DtypeMismatch: the batch does not fit the layer.
        TooFewValues: one value per channel, and the layer has no running statistics.
    """
    kernels, moved = _ready(state, batch, differentiable=differentiable)
    found: BatchStatistics[A] | None = None
    output = moved
    if state.running_mean is not None:
        output = kernels.with_statistics(state, moved, state.running_mean, state.running_var)
        if statistics:
            found = BatchStatistics(*kernels.statistics(state, moved, state.running_mean, state.running_var))
    elif _values(state, batch):
        check_enough(_values(state, batch), 2)
        output, _, used = kernels.with_own_statistics(state, moved)
        found = BatchStatistics(*used()) if statistics else None
    output = _finished(state, kernels, output)
    return EvalResult(output, state.version, state.num_batches_tracked, state.digest, found)


def _step(
    state: LocalState,
    kernels: Kernels,
    output: Any,
    moments: BatchMoments,
    statistics: Callable[[], tuple[Any, Any, Any]],
) -> Step[Any]:
    _check_finite(state, moments, lambda: kernels.all_finite(output))
    return Step(_finished(state, kernels, output), moments, statistics)


def _check_finite(
    state: LocalState, moments: BatchMoments, output_is_finite: Callable[[], bool] = lambda: True
) -> None:
    if state.config.non_finite != "reject":
        return
    # No element is larger than the norm, which is quicker to compute than whether each is finite.
    mean_norm, var_norm = (math.sqrt(np.vdot(vector, vector)) for vector in (moments.mean, moments.var))
    if mean_norm < math.inf and var_norm <= _MAX[state.config.dtype] and output_is_finite():
        return
    with np.errstate(over="ignore"):
        var = moments.var.astype(state.config.dtype)  # float64 for population statistics
    for what, finite in (
        ("the batch's mean", bool(np.isfinite(moments.mean).all())),
        ("the batch's variance", bool(np.isfinite(var).all())),
        ("the output", output_is_finite()),
    ):
        if not finite:
            raise NonFinite(f'{what} is not finite; a layer with non_finite: "allow" takes such batches', field="input")


def _finished(state: LocalState, kernels: Kernels, output: Any) -> Any:
    if state.config.clip is not None:
        output = kernels.clip(output, state.config.clip)
    return output if state.config.channel_axis == 1 else kernels.move(output, 1, state.config.channel_axis)


def _ready(state: LocalState, batch: Any, *, differentiable: bool = False) -> tuple[Kernels, Any]:
    """Check the batch; return the arithmetic for its type of array, and the batch with its channels on axis 1."""
    if isinstance(batch, np.ndarray):
        if isinstance(batch, np.ma.MaskedArray):
            raise TypeError("a masked array cannot be normalized: its mask would be lost")
        kernels, dtype = cast(Kernels, numpy_kernels), batch.dtype.name
    elif type(batch).__module__.partition(".")[0] == "torch":
        kernels, dtype = _torch_kernels(), _torch_name(batch.dtype)
        if batch.requires_grad and not differentiable:
            batch = batch.detach()
    else:
        raise TypeError(f"a numpy array or a torch tensor is needed, not {type(batch).__name__}")
    check_input(state.config, dtype, tuple(batch.shape))
    axis = state.config.channel_axis
    return kernels, batch if axis == 1 else kernels.move(batch, axis, 1)


@cache
def _torch_kernels() -> Kernels:
    from batchnorm_client.kernels import torch as torch_kernels  # noqa: PLC0415 - torch is there already

    return cast(Kernels, torch_kernels)


@cache
def _torch_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _values(state: LocalState, batch: Any) -> int:
    elements: int = math.prod(batch.shape)
    return elements // state.config.num_features
