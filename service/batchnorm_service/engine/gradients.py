"""The backward pass, for callers that keep no autograd graph: torch's own kernel, and the sums that shards exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm_client.kernels.checks import check_enough, least_values

from .layout import Batch, beside, channels_back, channels_second, fetch, per_channel, values_per_channel
from .moments import Channels, Moments, exact_moments, merge
from .state import LayerState


class Gradients(NamedTuple):
    """What a backward pass gives, on the CPU.

    Attributes:
        grad_input: as the input in shape and dtype.
        grad_weight: (C,); None unless affine.
        grad_bias: (C,); None unless affine.
    """

    grad_input: Batch
    grad_weight: Channels | None
    grad_bias: Channels | None


@dataclass(frozen=True, slots=True, eq=False)
class GradientSums:
    """What the backward pass of a synchronized batch needs of one shard, or of all (as SyncBatchNorm exchanges them).

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
    weight, bias, mean, var = beside(batch, state.weight, state.bias, state.running_mean, state.running_var)
    if training:
        mean, var = _scratch(state, moved)
    output, save_mean, save_invstd = torch.native_batch_norm(
        moved, weight, bias, mean, var, training, 1.0 if training else 0.0, config.eps
    )
    if config.clip is not None:
        # A bound that the dtype does not have is its largest number, as for the output.
        grad = grad.masked_fill(output.abs() > min(config.clip, torch.finfo(output.dtype).max), 0)
    mask = [True, state.weight is not None, state.bias is not None]
    grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, moved, weight, mean, var, save_mean, save_invstd, training, config.eps, mask
    )
    grad_input = channels_back(config, grad_input).contiguous()  # as it travels: here, not on the event loop
    if state.weight is None:
        return Gradients(fetch(batch, grad_input)[0], None, None)
    return Gradients(*fetch(batch, grad_input, grad_weight, grad_bias))


def gradient_sums(state: LayerState, batch: Batch, grad_output: Batch) -> GradientSums:
    """What the other members of a group need to know of this shard."""
    moved, grad = _wide(state, batch), _wide(state, grad_output)
    axes = [axis for axis in range(moved.dim()) if axis != 1]
    if batch.is_cpu:
        moments = exact_moments(channels_second(state.config, batch))
        centered = moved - per_channel(moments.mean, moved)
        return GradientSums(moments, grad.sum(axes), (grad * centered).sum(axes))
    var, mean = torch.var_mean(moved, axes, correction=0)  # at once: the whole batch is widened here anyway
    centered = moved - per_channel(mean, moved)
    mean, var, total, product = fetch(batch, mean, var, grad.sum(axes), (grad * centered).sum(axes))
    return GradientSums(Moments(values_per_channel(state.config, batch), mean, var, correction=0), total, product)


def merge_sums(parts: list[GradientSums], channels: int) -> GradientSums:
    """The sums of the whole batch; each part's were centered at its own mean."""
    whole = merge((part.moments for part in parts), channels)
    grad, centered = torch.zeros_like(whole.mean), torch.zeros_like(whole.mean)
    for part in parts:
        grad = grad + part.grad
        centered = centered + part.grad_centered + part.grad * (part.moments.mean - whole.mean)
    return GradientSums(whole, grad, centered)


def shard_backward(state: LayerState, batch: Batch, grad_output: Batch, whole: GradientSums) -> Gradients:
    """The gradients of one shard: grad_input as if the whole batch had been there, parameters summed over this shard.

    As SyncBatchNorm's backward (torch.nn.SyncBatchNorm): the sum of the shards' grad_weight is the whole batch's.

    Raises:
        TooFewValues: the whole batch has one value per channel.
    """
    check_enough(whole.moments.count, least_values(state.config))
    own = gradient_sums(state, batch, grad_output) if batch.is_cpu else None
    moved, grad = _wide(state, batch), _wide(state, grad_output)
    count, mean = whole.moments.count, whole.moments.mean
    invstd = torch.rsqrt(whole.moments.biased_var() + state.config.eps)
    weight = torch.ones_like(mean) if state.weight is None else state.weight.double()
    vectors = beside(batch, mean, invstd**2 * whole.grad_centered / count, whole.grad / count, invstd * weight)
    mean_there, slope, offset, scale = (per_channel(one, moved) for one in vectors if one is not None)
    grad_input = (grad - offset - (moved - mean_there) * slope) * scale
    grad_input = channels_back(state.config, grad_input).to(batch.dtype)
    if state.weight is None:
        return Gradients(fetch(batch, grad_input)[0], None, None)
    if own is not None:
        grad_weight, grad_bias = own.grad_centered + own.grad * (own.moments.mean - mean), own.grad
    else:  # centered at the whole's mean right away: nothing waits for the shard's own
        axes = [axis for axis in range(moved.dim()) if axis != 1]
        products = (grad * (moved - mean_there)).sum(axes)
        grad_input, grad_weight, grad_bias = fetch(batch, grad_input, products, grad.sum(axes))
    return Gradients(grad_input, (grad_weight * invstd).to(state.dtype), grad_bias.to(state.dtype))


def _scratch(state: LayerState, moved: Batch) -> tuple[Tensor | None, Tensor | None]:
    """Buffers for the kernel to write into, where torch's module has some: without any, half precision is rounded."""
    if state.weight is None and not state.tracks:
        return None, None
    shape = state.config.num_features
    return tuple(torch.zeros(shape, dtype=state.dtype, device=moved.device) for _ in range(2))  # type: ignore[return-value]


def _wide(state: LayerState, batch: Batch) -> Batch:
    return channels_second(state.config, batch).double()


def _zero_parameters(state: LayerState) -> tuple[Channels | None, Channels | None]:
    zeros = None if state.weight is None else torch.zeros_like(state.weight)
    return zeros, zeros
