"""Normalizing a batch: pure functions on torch tensors, in torch's own kernels.

    output = (input - mean) / sqrt(var + eps) * weight + bias

per channel (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167). In train mode mean and biased variance are the
batch's own, in eval mode the running ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from batchnorm_client.contract import INPUT_DTYPES, LayerConfig
from batchnorm_client.errors import DtypeMismatch, ShapeMismatch, TooFewValues
from batchnorm_client.tensors import Tensor as WireTensor

from .state import Channels, LayerState
from .statistics import Moments, check_finite

Batch = Float[Tensor, "..."]  # rank >= 2: (N, C, *), or (N, *, C) with channel_axis=-1


class TrainStep(NamedTuple):
    """What a batch gives in train mode.

    Attributes:
        output: as the input in shape and dtype.
        moments: of the batch, in the state's dtype, on the CPU.
        invstd: 1 / sqrt(biased variance + eps), (C,): what a backward pass needs beside the mean.
    """

    output: Batch
    moments: Moments
    invstd: Channels


def check_input(config: LayerConfig, tensor: WireTensor, field: str = "input") -> None:
    """Refuse a batch that does not fit the layer, before anything is computed or copied.

    Raises:
        DtypeMismatch: not a dtype that a layer of this dtype takes.
        ShapeMismatch: another rank, or another number of channels, than the layer has.
    """
    allowed = INPUT_DTYPES[config.dtype]
    if tensor.dtype not in allowed:
        raise DtypeMismatch(
            f"{field} must be {' or '.join(allowed)} for a {config.dtype} layer, got {tensor.dtype}",
            field=field,
            expected=list(allowed),
            got=tensor.dtype,
        )
    shape, ranks, axis = tensor.shape, config.input_ranks, config.channel_axis
    rank = len(shape)
    if rank not in ranks if ranks else not 2 <= rank <= 64:
        raise ShapeMismatch(
            f"{field} must have rank {' or '.join(map(str, ranks)) if ranks else '2 to 64'}, got shape {shape}",
            field=field,
            expected={"rank": list(ranks) if ranks else ">= 2"},
            got=list(shape),
        )
    if not -rank < axis < rank or shape[axis] != config.num_features:
        raise ShapeMismatch(
            f"{field} must have {config.num_features} channels on axis {axis}, got shape {shape}",
            field=field,
            expected={"num_features": config.num_features, "channel_axis": axis},
            got=list(shape),
        )


def train_step(state: LayerState, batch: Batch) -> TrainStep:
    """Normalize with the batch's own statistics. Changes nothing: the moments are for `statistics.fold`.

    Args:
        state: its config, weight and bias count; the running statistics do not.
        batch: a tensor that passed `check_input`, on the layer's device.

    Raises:
        TooFewValues: fewer than two values per channel.
        NonFinite: NaN, infinity or overflow, and the layer rejects that.
    """
    count = _enough(state, batch)
    step = _kernel(state, _channels_second(state.config, batch), count)
    if state.config.non_finite == "reject":
        step.moments.check_finite()
        _check_output(state, step.output, count)
    return step._replace(output=_channels_back(state.config, step.output))


def eval_step(state: LayerState, batch: Batch) -> Batch:
    """Normalize with the running statistics, or with the batch's own in a layer created without them.

    Raises:
        TooFewValues: batch statistics of exactly one value per channel. (An empty batch gives an empty output.)
    """
    if batch.numel() == 0:
        return torch.empty_like(batch)
    moved = _channels_second(state.config, batch)
    if state.running_mean is None or state.running_var is None:
        output = _kernel(state, moved, _enough(state, batch)).output
    else:
        weight, bias, mean, var = (
            _on(batch.device, tensor) for tensor in (state.weight, state.bias, state.running_mean, state.running_var)
        )
        output = torch.native_batch_norm(moved, weight, bias, mean, var, False, 0.0, state.config.eps)[0]
    return _channels_back(state.config, output)


def eval_statistics(state: LayerState, batch: Batch) -> dict[str, Channels]:
    """The statistics that `eval_step` normalizes with, by their names on the wire; none for an empty batch."""
    if state.running_mean is not None and state.running_var is not None:
        invstd = torch.rsqrt(state.running_var + state.config.eps)
        return {"batch_mean": state.running_mean, "batch_var": state.running_var, "batch_invstd": invstd}
    if batch.numel() == 0:
        return {}
    return named_statistics(_kernel(state, _channels_second(state.config, batch), _enough(state, batch)))


def named_statistics(step: TrainStep) -> dict[str, Channels]:
    """The statistics that a batch was normalized with, by their names on the wire."""
    return {"batch_mean": step.moments.mean, "batch_var": step.moments.biased_var(), "batch_invstd": step.invstd}


def _enough(state: LayerState, batch: Batch) -> int:
    count = values_per_channel(state.config, batch)
    if count < 2:
        raise TooFewValues(
            f"batch statistics need more than 1 value per channel, got shape {tuple(batch.shape)}",
            field="input",
            expected="> 1",
            got=count,
        )
    return count


def values_per_channel(config: LayerConfig, batch: Batch) -> int:
    """N*H*W: how many values each channel of the batch has."""
    return batch.numel() // config.num_features


def _kernel(state: LayerState, moved: Batch, count: int) -> TrainStep:
    """torch's own training kernel, which gives output, mean and unbiased variance in one pass.

    With momentum 1 the scratch buffers end as the batch's mean and unbiased variance. A layer with neither affine nor
    running statistics gets no buffers, as in torch: half precision is rounded differently then.
    """
    device, eps = moved.device, state.config.eps
    if state.weight is None and not state.tracks and moved.dtype in (torch.float16, torch.bfloat16):
        output, _, _ = torch.native_batch_norm(moved, None, None, None, None, True, 0.0, eps)
        axes = [axis for axis in range(moved.dim()) if axis != 1]
        var, mean = torch.var_mean(moved.to(state.dtype), axes, correction=1)
        invstd = torch.rsqrt(var * ((count - 1) / count) + eps)
    else:
        mean = torch.zeros(state.config.num_features, dtype=state.dtype, device=device)
        var = torch.zeros(state.config.num_features, dtype=state.dtype, device=device)
        weight, bias = _on(device, state.weight), _on(device, state.bias)
        output, _, invstd = torch.native_batch_norm(moved, weight, bias, mean, var, True, 1.0, eps)
    moments = Moments(count, mean.cpu(), var.cpu(), correction=1, strided=not _is_dense(moved))
    return TrainStep(output, moments, invstd.cpu())


def _is_dense(batch: Batch) -> bool:
    """Whether torch's kernel takes its path for contiguous memory, channels first or last."""
    return (
        batch.is_contiguous()
        or batch.is_contiguous(memory_format=torch.channels_last)
        or batch.is_contiguous(memory_format=torch.channels_last_3d)
    )


def _check_output(state: LayerState, output: Batch, count: int) -> None:
    """Refuse an output that overflowed its dtype; a pass over the output is made only where that is possible.

    |x - mean| / std is at most sqrt(count - 1), so |output| is at most max|weight| * sqrt(count) + max|bias|; the
    factor 2 covers rounding.
    """
    if state.weight is None or state.bias is None:
        bound = math.sqrt(count)
    else:
        bound = float(state.weight.abs().max()) * math.sqrt(count) + float(state.bias.abs().max())
    if not 2 * bound < torch.finfo(output.dtype).max:
        check_finite(output, "the output", "input")


def _channels_second(config: LayerConfig, batch: Batch) -> Batch:
    return batch if config.channel_axis == 1 else batch.movedim(config.channel_axis, 1)


def _channels_back(config: LayerConfig, output: Batch) -> Batch:
    return output if config.channel_axis == 1 else output.movedim(1, config.channel_axis)


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
