"""A batch's memory layout: its channel axis, its density, and its device."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from batchnorm_client.wire.documents import LayerConfig

from .staging import staging

Batch = Float[Tensor, "..."]  # rank >= 2: (N, C, *), or (N, *, C) with channel_axis=-1


def channels_second(config: LayerConfig, batch: Batch) -> Batch:
    """A view of the batch with shape (N, C, *), as torch's kernels need it."""
    return batch if config.channel_axis == 1 else batch.movedim(config.channel_axis, 1)


def channels_back(config: LayerConfig, batch: Batch) -> Batch:
    """The inverse of `channels_second`."""
    return batch if config.channel_axis == 1 else batch.movedim(1, config.channel_axis)


def per_channel(vector: Tensor, moved: Batch) -> Tensor:
    """A view of a (C,) tensor that broadcasts against a batch of shape (N, C, *)."""
    return vector.view(-1, *[1] * (moved.dim() - 2))


def values_per_channel(config: LayerConfig, batch: Batch) -> int:
    """Values per channel of the batch: N*H*W."""
    return batch.numel() // config.num_features


def is_dense(batch: Batch) -> bool:
    """Whether torch's kernel takes its path for contiguous memory, channels first or last."""
    return (
        batch.is_contiguous()
        or batch.is_contiguous(memory_format=torch.channels_last)
        or batch.is_contiguous(memory_format=torch.channels_last_3d)
    )


def to_device_of(batch: Batch, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Copy a state's tensors from the CPU to the batch's device, asynchronously; None stays None."""
    if batch.is_cpu:
        return tensors
    device = batch.device
    return tuple(
        tensor if tensor is None or tensor.device == device else staging(device).upload(tensor, device)
        for tensor in tensors
    )


def fetch(batch: Batch, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy results from the batch's device to the CPU. The only operation that waits for the device: use it once."""
    return tensors if batch.is_cpu else staging(batch.device).download(*tensors)
