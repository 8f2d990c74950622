"""Normalizing a batch: pure functions on torch tensors, with torch's own kernels.

    output = (input - mean) / sqrt(var + eps) * weight + bias

per channel (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167). In train mode mean and biased variance are the
batch's own, in eval mode the running ones.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from batchnorm_client.kernels import checks
from batchnorm_client.kernels.checks import check_enough, least_values
from batchnorm_client.kernels.torch import batch_statistics, is_narrow, train_kernel
from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.statistics import STATISTICS
from batchnorm_client.wire.tensors import Tensor as WireTensor

from .device_moments import launch_moments, merge_launched
from .layout import Batch, channels_back, channels_second, fetch, is_dense, to_device_of, values_per_channel
from .moments import (
    Channels,
    Extremes,
    Moments,
    check_finite,
    check_fits,
    exact_moments,
    extremes,
    sums_of_squares,
)
from .state import LayerState


class TrainStep(NamedTuple):
    """Result of normalizing a batch with batch statistics, on the CPU.

    Attributes:
        output: in the input's shape and dtype.
        moments: the batch's moments, for `running_statistics.fold`.
        mean: (C,), the batch's mean in the state's dtype.
        invstd: (C,), 1 / sqrt(biased variance + eps), in the state's dtype.
    """

    output: Batch
    moments: Moments
    mean: Channels
    invstd: Channels


def check_input(config: LayerConfig, tensor: WireTensor, field: str = "input") -> None:
    """Refuse a batch whose shape or dtype does not fit the layer: see `kernels.checks.check_input`."""
    checks.check_input(config, tensor.dtype, tensor.shape, field)


def empty_shape(config: LayerConfig) -> tuple[int, ...]:
    """The shape of an empty batch, of the smallest rank that the layer accepts."""
    shape = [0] * config.smallest_rank
    shape[config.channel_axis] = config.num_features
    return tuple(shape)


def train_step(state: LayerState, batch: Batch) -> TrainStep:
    """Normalize with the batch's own statistics.

    Args:
        state: the layer; its running statistics are not used.
        batch: a tensor that passed `check_input`, on the layer's device.

    Raises:
        TooFewValues: fewer than two values per channel; for population statistics, none.
        NonFinite: NaN, infinity or overflow, and the layer rejects that.
    """
    config = state.config
    count = values_per_channel(config, batch)
    check_enough(count, least_values(config))
    moved = channels_second(config, batch)
    step = _kernel(state, moved, count)
    exact = STATISTICS[config.statistics].exact_moments
    if not moved.is_cpu:
        step = _fetch_step(moved, step, exact=exact)
    elif exact:
        step = step._replace(moments=exact_moments(moved))
    if config.non_finite == "reject":
        _check_finite(state, step, count)
    output = _finish_output(config, config.clip, step.output)
    return step if output is step.output else step._replace(output=output)


def batch_moments(state: LayerState, batch: Batch) -> Moments:
    """The moments of a batch that is not normalized with them: those of `train_step`.

    Args:
        state: the layer, whose tracking is on; its tensors are not used.
        batch: a tensor that passed `check_input`, on the layer's device.

    Raises:
        TooFewValues: fewer than two values per channel; for population statistics, none.
        NonFinite: NaN, infinity or overflow of the moments, and the layer rejects that.
    """
    config = state.config
    count = values_per_channel(config, batch)
    check_enough(count, least_values(config))
    moved = channels_second(config, batch)
    if STATISTICS[config.statistics].exact_moments:
        moments = exact_moments(moved) if moved.is_cpu else merge_launched(moved, fetch(moved, *launch_moments(moved)))
    else:
        mean, var = fetch(moved, *batch_statistics(moved, state.dtype))
        moments = Moments(count, mean, var, 1, strided=not is_dense(moved))
    if config.non_finite == "reject":
        moments.check_finite()
    return moments


def shard_moments(state: LayerState, batch: Batch) -> tuple[Moments, Extremes]:
    """The moments (in float64) and the range of one shard of a synchronized batch; a shard may be empty."""
    moved = channels_second(state.config, batch)
    if moved.is_cpu:
        return exact_moments(moved), extremes(moved)
    axes = [axis for axis in range(moved.dim()) if axis != 1]
    bounds = moved.amin(axes).double(), moved.amax(axes).double()
    low, high, *vectors = fetch(moved, *bounds, *launch_moments(moved))
    return merge_launched(moved, vectors), Extremes(low, high, torch.finfo(moved.dtype).max)


def check_whole(state: LayerState, moments: Moments, ranges: Extremes) -> None:
    """Check a synchronized batch before any of its shards is normalized.

    Args:
        state: the layer.
        moments: of all shards.
        ranges: of all shards.

    Raises:
        InvalidRequest: its count exceeds 64 bits.
        TooFewValues: fewer than two values per channel; for population statistics, none.
        NonFinite: NaN, infinity or overflow, and the layer rejects that.
    """
    check_fits("count", moments.count)
    check_enough(moments.count, least_values(state.config))
    if state.config.non_finite == "allow":
        return
    moments.check_finite()
    _check_parameters(state)
    mean, var = moments.mean.to(state.dtype), moments.biased_var().to(state.dtype)
    check_finite(mean, "the batch's mean", "input")
    check_finite(var, "the batch's variance", "input")
    # The kernel computes input * scale + (bias - mean * scale) in the state's dtype: check its intermediate results.
    scale = invstd = torch.rsqrt(var + state.config.eps)
    bias = torch.zeros_like(mean)
    if state.weight is not None and state.bias is not None:
        scale, bias = invstd * state.weight, state.bias
    offset = mean * scale
    for step in (invstd, scale, offset):
        check_finite(step, "the output", "input")
    shift = (bias - offset).double()
    for bound in (ranges.low, ranges.high):
        product = bound * scale.double()
        rounded = _rounding(state.dtype) * (product.abs() + offset.double().abs() + bias.double().abs())
        fits = (product.abs() <= _max_finite(state.dtype)) & ((product + shift).abs() + rounded <= ranges.limit)
        # A bound is infinite if there are no values.
        check_finite(torch.where(bound.isfinite() & ~fits, torch.inf, 0.0), "the output", "input")


class OutputParameters(NamedTuple):
    """The part of a layer's state that a training output depends on.

    Attributes:
        weight: (C,), or None.
        bias: (C,), or None.
        eps: added to the variance.
        clip: the bound of the output's absolute value, or None.
    """

    weight: Channels | None
    bias: Channels | None
    eps: float
    clip: float | None


def output_parameters(state: LayerState) -> OutputParameters:
    """The part of the state that a training output depends on."""
    return OutputParameters(state.weight, state.bias, state.config.eps, state.config.clip)


def normalize_with(state: LayerState, parameters: OutputParameters, batch: Batch, moments: Moments) -> TrainStep:
    """Normalize a shard with the statistics of the whole synchronized batch.

    Args:
        state: the layer; only its channel axis and dtype are used.
        parameters: of the state that the whole batch was folded into.
        batch: the shard; it may be empty.
        moments: of the whole batch.
    """
    config, dtype = state.config, state.dtype
    mean, var = moments.mean.to(dtype), moments.biased_var().to(dtype)
    output = torch.empty_like(batch)
    if batch.numel():
        moved = channels_second(config, batch)
        weight, bias, device_mean, device_var = to_device_of(batch, parameters.weight, parameters.bias, mean, var)
        output = torch.native_batch_norm(moved, weight, bias, device_mean, device_var, False, 0.0, parameters.eps)[0]
        (output,) = fetch(batch, _finish_output(config, parameters.clip, output))
    invstd = torch.rsqrt(moments.biased_var() + parameters.eps).to(dtype)
    return TrainStep(output, moments, mean, invstd)


def eval_step(state: LayerState, batch: Batch) -> Batch:
    """Normalize with the running statistics, or with the batch's own in a layer created without them.

    The output is on the CPU, in the batch's shape and dtype; that of an empty batch is empty.

    Raises:
        TooFewValues: the batch's own statistics are needed, and it has one value per channel.
    """
    moved = channels_second(state.config, batch)
    if batch.numel() == 0:
        return torch.empty_like(batch)
    if state.running_mean is None or state.running_var is None:
        output = _batch_statistics_step(state, moved).output
    else:
        output = _normalize_with(state, moved, state.running_mean, state.running_var)
    output = _finish_output(state.config, state.config.clip, output)
    return output if output.is_cpu else fetch(batch, output)[0]


def eval_statistics(state: LayerState, batch: Batch) -> dict[str, Channels]:
    """The statistics that `eval_step` normalizes with, by their names on the wire; none for an empty batch."""
    if state.running_mean is not None and state.running_var is not None:
        invstd = torch.rsqrt(state.running_var + state.config.eps)
        return {"batch_mean": state.running_mean, "batch_var": state.running_var, "batch_invstd": invstd}
    if batch.numel() == 0:
        return {}
    moved = channels_second(state.config, batch)
    step = _batch_statistics_step(state, moved)
    if not moved.is_cpu:
        step = _fetch_step(moved, step._replace(output=moved[:0]))  # the output is not needed: do not download it
    return named_statistics(step)


def named_statistics(step: TrainStep) -> dict[str, Channels]:
    """The statistics that a batch was normalized with, by their names on the wire."""
    var = step.moments.biased_var().to(step.mean.dtype)
    return {"batch_mean": step.mean, "batch_var": var, "batch_invstd": step.invstd}


def _check_finite(state: LayerState, step: TrainStep, count: int) -> None:
    """Refuse moments that are not finite, and an output that overflowed its dtype.

    The output is scanned only if a bound says that it can have overflowed. |x - mean| / std is at most sqrt(count - 1),
    so |output| is at most max|weight| * sqrt(count) + max|bias|, plus the kernel's rounding errors. The kernel first
    multiplies both x and the mean by weight / sqrt(var + eps) and rounds the products, so these intermediate results
    are bounded too. Norms of vectors, which are cheap, replace the maxima of their elements; the factor 2 covers
    rounding errors of the statistics.
    """
    moments, weight, bias = step.moments, 1.0, 0.0
    # step.mean, not moments.mean: the kernel's mean may overflow where a population's, in float64, does not.
    if state.weight is None or state.bias is None:
        mean, var = sums_of_squares(step.mean, moments.var)
    else:
        mean, var, weight, bias = sums_of_squares(step.mean, moments.var, state.weight, state.bias)
    if not (math.isfinite(mean) and math.sqrt(var) <= _max_finite(state.dtype)):
        moments.check_finite()
        check_finite(moments.var.to(state.dtype), "the batch's variance", "input")
    inner = step.output.dtype if is_narrow(step.output, state.weight, state.tracks) else state.dtype
    bound = math.sqrt(weight * count) + math.sqrt(bias)
    intermediate = bound + math.sqrt(max(weight, 1.0) / state.config.eps) * (1 + math.sqrt(mean))
    bound += _rounding(inner) * intermediate
    if not (2 * bound < _max_finite(step.output.dtype) and 2 * intermediate < _max_finite(inner)):
        _check_parameters(state)
        check_finite(step.output, "the output", "input")


def _check_parameters(state: LayerState) -> None:
    """Refuse a weight or bias that is not finite, so that the problem names it instead of the batch."""
    for name, parameter in (("weight", state.weight), ("bias", state.bias)):
        if parameter is not None:
            check_finite(parameter, f"the layer's {name}", name)


@lru_cache
def _max_finite(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


@lru_cache
def _rounding(dtype: torch.dtype) -> float:
    """A bound of the rounding error of one normalization, relative to its largest intermediate result.

    torch's kernels round four or five times by half an eps; on CUDA the mean has a slightly larger error.
    """
    return 32 * torch.finfo(dtype).eps


def _kernel(state: LayerState, moved: Batch, count: int) -> TrainStep:
    weight, bias = to_device_of(moved, state.weight, state.bias)
    narrow = is_narrow(moved, state.weight, state.tracks)
    output, mean, var, invstd = train_kernel(
        moved, weight, bias, eps=state.config.eps, dtype=state.dtype, narrow=narrow
    )
    return TrainStep(output, Moments(count, mean, var, 1, strided=not is_dense(moved)), mean, invstd)


def _fetch_step(moved: Batch, step: TrainStep, *, exact: bool = False) -> TrainStep:
    """The step's tensors on the CPU, in one download; with `exact`, also the moments in float64."""
    vectors = launch_moments(moved) if exact else []
    parts = step.output, step.mean, step.moments.var, step.invstd
    output, mean, var, invstd, *vectors = fetch(moved, *parts, *vectors)
    moments = merge_launched(moved, vectors) if exact else replace(step.moments, mean=mean, var=var)
    return TrainStep(output, moments, mean, invstd)


def _batch_statistics_step(state: LayerState, moved: Batch) -> TrainStep:
    count = values_per_channel(state.config, moved)
    check_enough(count, 2)
    return _kernel(state, moved, count)


def _normalize_with(state: LayerState, moved: Batch, mean: Channels, var: Channels) -> Batch:
    weight, bias, device_mean, device_var = to_device_of(moved, state.weight, state.bias, mean, var)
    return torch.native_batch_norm(moved, weight, bias, device_mean, device_var, False, 0.0, state.config.eps)[0]


def _finish_output(config: LayerConfig, clip: float | None, output: Batch) -> Batch:
    """Clip the kernel's output in place, and move the channel axis back to its place in the input."""
    if clip is not None:
        clip = min(clip, _max_finite(output.dtype))  # torch refuses a bound outside the dtype's range
        output = output.clamp_(-clip, clip)
    return channels_back(config, output)
