"""Normalizing with torch's own kernels: see `core.local.Kernels`. The service's engine uses them, too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm_client.kernels.moments import BatchMoments, Sums, merge_chunks
from batchnorm_client.kernels.state import LocalState
from batchnorm_client.wire.statistics import STATISTICS

Statistics = tuple[Tensor, Tensor, Tensor]

_HALF = (torch.float16, torch.bfloat16)


def train_kernel(
    batch: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, dtype: torch.dtype, narrow: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch's own training kernel: the output and the batch's statistics in one pass, on the batch's device.

    With momentum 1, the scratch buffers contain the batch's mean and unbiased variance afterwards.

    Args:
        batch: (N, C, *), at least one value per channel; the variance of one has no meaning.
        weight: gamma, (C,), on the batch's device; or None.
        bias: beta, (C,), on the batch's device; or None.
        eps: added to the biased variance.
        dtype: of the layer's state.
        narrow: `is_narrow` of this layer and batch: then there are no buffers.

    Returns:
        The output, as the batch in shape and dtype; mean, unbiased variance and 1 / sqrt(biased variance + eps), (C,)
        in the layer's dtype.
    """
    if narrow:
        output, _, _ = torch.native_batch_norm(batch, None, None, None, None, True, 0.0, eps)
        count = batch.numel() // batch.shape[1]
        var, mean = torch.var_mean(batch.detach().to(dtype), _axes(batch), correction=min(1, count - 1))
        return output, mean, var, torch.rsqrt(var * ((count - 1) / count) + eps)
    mean = torch.zeros(batch.shape[1], dtype=dtype, device=batch.device)
    var = torch.zeros(batch.shape[1], dtype=dtype, device=batch.device)
    output, _, invstd = torch.native_batch_norm(batch, weight, bias, mean, var, True, 1.0, eps)
    return output, mean, var, invstd


def batch_statistics(batch: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased variance that `train_kernel` computes, from the same code of torch's, without output.

    Args:
        batch: (N, C, *), at least two values per channel.
        dtype: of the layer's state.
    """
    mean = torch.zeros(batch.shape[1], dtype=dtype, device=batch.device)
    var = torch.zeros(batch.shape[1], dtype=dtype, device=batch.device)
    torch.batch_norm_update_stats(batch, mean, var, 1.0)
    return mean, var


def is_narrow(batch: Tensor, weight: Tensor | None, tracks: bool) -> bool:
    """Whether torch's kernel keeps mean and deviation in half precision, as it does without any tensor in float32.

    Args:
        batch: the input, or another tensor of its dtype.
        weight: gamma; None for a layer that is not affine.
        tracks: whether the layer folds into running statistics.
    """
    return weight is None and not tracks and batch.dtype in _HALF


def exact_sums(batch: Tensor) -> Sums[Tensor]:
    """The sums of (N, C, *) in float64, whatever the batch's dtype; on the CPU."""
    channels, axes = batch.shape[1], _axes(batch)

    def chunk_sums(chunk: Tensor) -> Sums[Tensor]:
        count = chunk.numel() // channels
        var, mean = torch.var_mean(chunk.double(), axes, correction=0)
        return Sums(count, mean.cpu(), var.cpu() * count)

    zeros = torch.zeros(channels, dtype=torch.float64)
    return merge_chunks(batch, chunk_sums, Sums(0, zeros, zeros))


def with_own_statistics(state: LocalState, batch: Tensor) -> tuple[Tensor, BatchMoments, Callable[[], Statistics]]:
    """Normalize (N, C, *) with its own statistics; as torch's own function does, with its gradients."""
    config, dtype = state.config, _dtype(state)
    weight, bias = _on(batch, dtype, state.weight, state.bias)
    narrow = is_narrow(batch, weight, config.track_running_stats)
    output, mean, var, invstd = train_kernel(batch, weight, bias, eps=config.eps, dtype=dtype, narrow=narrow)
    if STATISTICS[config.statistics].exact_moments:
        found = moments(batch)
    else:
        count = batch.numel() // config.num_features
        wide_mean, wide_var = (vector.cpu().numpy().astype(np.float64) for vector in (mean, var))
        found = BatchMoments(count, wide_mean, wide_var * ((count - 1) / count))
    return output, found, lambda: (mean, torch.from_numpy(found.var).to(batch.device, dtype), invstd.to(dtype))


def with_statistics(state: LocalState, batch: Tensor, mean: Any, var: Any) -> Tensor:
    """Normalize (N, C, *) with a mean and a biased variance, (C,), of any float dtype; also with torch's gradients."""
    if not batch.numel():
        return torch.empty_like(batch)
    mean, var, weight, bias = _on(batch, _dtype(state), mean, var, state.weight, state.bias)
    return torch.native_batch_norm(batch, weight, bias, mean, var, False, 0.0, state.config.eps)[0]


def statistics(state: LocalState, batch: Tensor, mean: Any, var: Any) -> Statistics:
    """The statistics that `with_statistics` normalizes with, in the layer's dtype and on the batch's device."""
    dtype = _dtype(state)
    wide_mean, wide_var = (torch.as_tensor(vector).to(batch.device) for vector in (mean, var))
    return wide_mean.to(dtype), wide_var.to(dtype), torch.rsqrt(wide_var + state.config.eps).to(dtype)


def moments(batch: Tensor) -> BatchMoments:
    """The moments of (N, C, *) in float64; zeros for an empty batch."""
    count, mean, m2 = exact_sums(batch)
    return BatchMoments(int(count), mean.numpy(), (m2 / max(1, count)).numpy())


def move(batch: Tensor, source: int, destination: int) -> Tensor:
    """Move an axis."""
    return batch.movedim(source, destination)


def clip(batch: Tensor, bound: float) -> Tensor:
    """Clamp; a bound above the dtype's largest number is replaced by that number."""
    bound = min(bound, torch.finfo(batch.dtype).max)
    return batch.clamp(-bound, bound)


def all_finite(batch: Tensor) -> bool:
    """Whether it contains neither NaN nor infinity. One of these makes the sum so, too, which takes a pass less."""
    batch = batch.detach()
    return math.isfinite(batch.sum()) or bool(batch.isfinite().all())


def _axes(batch: Tensor) -> list[int]:
    """All axes but that of the channels."""
    return [axis for axis in range(batch.dim()) if axis != 1]


def _dtype(state: LocalState) -> torch.dtype:
    return torch.float64 if state.config.dtype == "float64" else torch.float32


def _on(batch: Tensor, dtype: torch.dtype, *vectors: Any) -> tuple[Tensor | None, ...]:
    """numpy or torch vectors as tensors on the batch's device; those that are there already stay as they are."""
    device = batch.device
    return tuple(
        vector
        if vector is None or (isinstance(vector, Tensor) and vector.dtype is dtype and vector.device == device)
        else torch.as_tensor(vector).to(device=device, dtype=dtype)
        for vector in vectors
    )
