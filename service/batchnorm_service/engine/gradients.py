"""The backward pass: torch's kernel for a batch, and the sums that the shards of a synchronized batch exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm_client.kernels.checks import check_enough, least_values

from .layout import Batch, channels_back, channels_second, fetch, per_channel, to_device_of, values_per_channel
from .moments import Channels, Moments, exact_moments, merge
from .state import LayerState


class Gradients(NamedTuple):
    """Gradients of one batch or shard, on the CPU.

    Attributes:
        grad_input: in the input's shape and dtype.
        grad_weight: (C,); None unless affine.
        grad_bias: (C,); None unless affine.
    """

    grad_input: Batch
    grad_weight: Channels | None
    grad_bias: Channels | None


@dataclass(frozen=True, slots=True, eq=False)
class GradientSums:
    """Sums over one shard or all shards, which the backward pass of a synchronized batch needs, as in SyncBatchNorm.

    Attributes:
        moments: of the input, in float64.
        grad: (C,) float64, the sum of grad_output.
        grad_centered: (C,) float64, the sum of grad_output * (input - moments.mean).
    """

    moments: Moments
    grad: Channels
    grad_centered: Channels


def backward_step(state: LayerState, batch: Batch, grad_output: Batch, *, training: bool) -> Gradients:
    """The gradients of a loss that has gradient `grad_output` with respect to the output.

    In train mode the batch's statistics are part of the graph, in eval mode the running ones are constants; a layer
    created without running statistics uses the batch's in both. Clipped outputs have no gradient.

    Raises:
        TooFewValues: the batch's own statistics of one value per channel.
    """
    config = state.config
    if batch.numel() == 0 and not training:
        return Gradients(torch.empty_like(batch), *_zero_parameters(state))
    moved, grad = channels_second(config, batch), channels_second(config, grad_output)
    training = training or state.running_mean is None
    if training:
        check_enough(values_per_channel(config, batch), least_values(config))
    weight, bias, mean, var = to_device_of(batch, state.weight, state.bias, state.running_mean, state.running_var)
    if training:
        mean, var = _scratch_buffers(state, moved)
    output, save_mean, save_invstd = torch.native_batch_norm(
        moved, weight, bias, mean, var, training, 1.0 if training else 0.0, config.eps
    )
    if config.clip is not None:
        # A clip beyond the dtype's range counts as the dtype's largest number, as for the output.
        grad = grad.masked_fill(output.abs() > min(config.clip, torch.finfo(output.dtype).max), 0)
    mask = [True, state.weight is not None, state.bias is not None]
    grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, moved, weight, mean, var, save_mean, save_invstd, training, config.eps, mask
    )
    grad_input = channels_back(config, grad_input).contiguous()  # encoding needs it so: copy here, off the event loop
    if state.weight is None:
        return Gradients(fetch(batch, grad_input)[0], None, None)
    return Gradients(*fetch(batch, grad_input, grad_weight, grad_bias))


def gradient_sums(state: LayerState, batch: Batch, grad_output: Batch) -> GradientSums:
    """The sums over this shard."""
    moved, grad = _to_double(state, batch), _to_double(state, grad_output)
    axes = [axis for axis in range(moved.dim()) if axis != 1]
    if batch.is_cpu:
        moments = exact_moments(channels_second(state.config, batch))
        centered = moved - per_channel(moments.mean, moved)
        return GradientSums(moments, grad.sum(axes), (grad * centered).sum(axes))
    var, mean = torch.var_mean(moved, axes, correction=0)  # not in chunks: the whole batch is in float64 anyway
    centered = moved - per_channel(mean, moved)
    mean, var, total, product = fetch(batch, mean, var, grad.sum(axes), (grad * centered).sum(axes))
    return GradientSums(Moments(values_per_channel(state.config, batch), mean, var, correction=0), total, product)


def merge_sums(parts: list[GradientSums], channels: int) -> GradientSums:
    """The sums over the whole batch. Each part's `grad_centered` is shifted from its own mean to the whole's."""
    whole = merge((part.moments for part in parts), channels)
    grad, centered = torch.zeros_like(whole.mean), torch.zeros_like(whole.mean)
    for part in parts:
        grad = grad + part.grad
        centered = centered + part.grad_centered + part.grad * (part.moments.mean - whole.mean)
    return GradientSums(whole, grad, centered)


def shard_backward(state: LayerState, batch: Batch, grad_output: Batch, whole: GradientSums) -> Gradients:
    """The gradients of one shard, as in torch.nn.SyncBatchNorm's backward.

    grad_input is that of the whole batch. grad_weight and grad_bias are sums over this shard only: their sums over all
    shards are the whole batch's.

    Raises:
        TooFewValues: the whole batch has one value per channel.
    """
    check_enough(whole.moments.count, least_values(state.config))
    own = gradient_sums(state, batch, grad_output) if batch.is_cpu else None
    moved, grad = _to_double(state, batch), _to_double(state, grad_output)
    count, mean = whole.moments.count, whole.moments.mean
    invstd = torch.rsqrt(whole.moments.biased_var() + state.config.eps)
    weight = torch.ones_like(mean) if state.weight is None else state.weight.double()
    vectors = to_device_of(batch, mean, invstd**2 * whole.grad_centered / count, whole.grad / count, invstd * weight)
    device_mean, slope, offset, scale = (per_channel(one, moved) for one in vectors if one is not None)
    grad_input = (grad - offset - (moved - device_mean) * slope) * scale
    grad_input = channels_back(state.config, grad_input).to(batch.dtype)
    if state.weight is None:
        return Gradients(fetch(batch, grad_input)[0], None, None)
    if own is not None:
        grad_weight, grad_bias = own.grad_centered + own.grad * (own.moments.mean - mean), own.grad
    else:  # centered at the whole's mean directly: one download instead of two
        axes = [axis for axis in range(moved.dim()) if axis != 1]
        products = (grad * (moved - device_mean)).sum(axes)
        grad_input, grad_weight, grad_bias = fetch(batch, grad_input, products, grad.sum(axes))
    return Gradients(grad_input, (grad_weight * invstd).to(state.dtype), grad_bias.to(state.dtype))


def _scratch_buffers(state: LayerState, moved: Batch) -> tuple[Tensor | None, Tensor | None]:
    """Running statistics for the kernel to overwrite, or None as in torch's module: half precision depends on it."""
    if state.weight is None and not state.tracks:
        return None, None
    shape = state.config.num_features
    return tuple(torch.zeros(shape, dtype=state.dtype, device=moved.device) for _ in range(2))  # type: ignore[return-value]


def _to_double(state: LayerState, batch: Batch) -> Batch:
    return channels_second(state.config, batch).double()


def _zero_parameters(state: LayerState) -> tuple[Channels | None, Channels | None]:
    zeros = None if state.weight is None else torch.zeros_like(state.weight)
    return zeros, zeros
