"""Where a batch keeps its channels, and where in memory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from batchnorm_client.wire.documents import LayerConfig

from .staging import staging

Batch = Float[Tensor, "..."]  # rank >= 2: (N, C, *), or (N, *, C) with channel_axis=-1


def channels_second(config: LayerConfig, batch: Batch) -> Batch:
    """The batch as torch's kernels want it, (N, C, *): a view."""
    return batch if config.channel_axis == 1 else batch.movedim(config.channel_axis, 1)


def channels_back(config: LayerConfig, batch: Batch) -> Batch:
    """The inverse of `channels_second`."""
    return batch if config.channel_axis == 1 else batch.movedim(1, config.channel_axis)


def per_channel(vector: Tensor, moved: Batch) -> Tensor:
    """A (C,) tensor that broadcasts against a batch of shape (N, C, *)."""
    return vector.view(-1, *[1] * (moved.dim() - 2))


def values_per_channel(config: LayerConfig, batch: Batch) -> int:
    """N*H*W: how many values each channel of the batch has."""
    return batch.numel() // config.num_features


def is_dense(batch: Batch) -> bool:
    """Whether torch's kernel takes its path for contiguous memory, channels first or last."""
    return (
        batch.is_contiguous()
        or batch.is_contiguous(memory_format=torch.channels_last)
        or batch.is_contiguous(memory_format=torch.channels_last_3d)
    )


def beside(batch: Batch, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of a state, which lives on the CPU, on the batch's device; None stays None. Waits for nothing."""
    if batch.is_cpu:
        return tensors
    device = batch.device
    return tuple(
        tensor if tensor is None or tensor.device == device else staging(device).upload(tensor, device)
        for tensor in tensors
    )


def fetch(batch: Batch, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What was computed of the batch, on the CPU. On another device this waits, and nothing else does: once a call."""
    return tensors if batch.is_cpu else staging(batch.device).download(*tensors)
