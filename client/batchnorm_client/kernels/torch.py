"""Normalizing with torch's own kernels, which the service uses too: see `core.local.Kernels`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm_client.kernels.moments import BatchMoments, merge

if TYPE_CHECKING:
    from batchnorm_client.core.local import LocalState

Statistics = tuple[Tensor, Tensor, Tensor]

_CHUNK = 1 << 17  # elements: what is widened to float64 at a time
_HALF = (torch.float16, torch.bfloat16)


def own(state: LocalState, batch: Tensor) -> tuple[Tensor, BatchMoments, Statistics]:
    """Normalize (N, C, *) with its own statistics, in one pass.

    With momentum 1 the scratch buffers end as the batch's mean and unbiased variance. A layer with neither affine nor
    running statistics gets no buffers, as in torch: half precision is rounded differently then.
    """
    config, dtype, device = state.config, _dtype(state), batch.device
    count = batch.numel() // config.num_features
    if state.weight is None and not config.track_running_stats and batch.dtype in _HALF:
        output, _, _ = torch.native_batch_norm(batch, None, None, None, None, True, 0.0, config.eps)
        axes = [axis for axis in range(batch.dim()) if axis != 1]
        var, mean = torch.var_mean(batch.to(dtype), axes, correction=1)
        invstd = torch.rsqrt(var * ((count - 1) / count) + config.eps)
    else:
        mean, var = (torch.zeros(config.num_features, dtype=dtype, device=device) for _ in range(2))
        weight, bias = _on(batch, dtype, state.weight, state.bias)
        output, _, invstd = torch.native_batch_norm(batch, weight, bias, mean, var, True, 1.0, config.eps)
    biased = var.double() * ((count - 1) / count)
    if config.statistics == "population":
        found = moments(batch)
        biased = torch.from_numpy(found.var).to(device)
    else:
        found = BatchMoments(count, mean.double().cpu().numpy(), biased.cpu().numpy())
    return output, found, (mean, biased.to(dtype), invstd.to(dtype))


def given(state: LocalState, batch: Tensor, mean: Any, var: Any) -> tuple[Tensor, Statistics]:
    """Normalize (N, C, *) with a mean and a biased variance, (C,), of any float dtype."""
    dtype = _dtype(state)
    mean_there, var_there, weight, bias = _on(batch, dtype, mean, var, state.weight, state.bias)
    output = torch.empty_like(batch)
    if batch.numel():
        output = torch.native_batch_norm(batch, weight, bias, mean_there, var_there, False, 0.0, state.config.eps)[0]
    wide = torch.as_tensor(var).to(batch.device)
    invstd = torch.rsqrt(wide + state.config.eps).to(dtype)
    assert mean_there is not None  # noqa: S101 - given
    assert var_there is not None  # noqa: S101
    return output, (mean_there, var_there, invstd)


def moments(batch: Tensor) -> BatchMoments:
    """The moments of (N, C, *) in float64, a piece at a time, so that no second copy of it is made."""
    channels = batch.shape[1]
    axes = [axis for axis in range(batch.dim()) if axis != 1]
    rows = max(1, _CHUNK * batch.shape[0] // max(1, batch.numel()))
    pieces = []
    for piece in torch.split(batch, rows):
        if piece.numel():
            var, mean = torch.var_mean(piece.double(), axes, correction=0)
            pieces.append(BatchMoments(piece.numel() // channels, mean.cpu().numpy(), var.cpu().numpy()))
    return merge(pieces, channels)


def move(batch: Tensor, source: int, destination: int) -> Tensor:
    """Move an axis."""
    return batch.movedim(source, destination)


def clip(batch: Tensor, bound: float) -> Tensor:
    """Clamp; a bound that the dtype does not have is its largest number."""
    bound = min(bound, torch.finfo(batch.dtype).max)
    return batch.clamp(-bound, bound)


def all_finite(batch: Tensor) -> bool:
    """Whether there is neither NaN nor infinity."""
    return bool(batch.isfinite().all())


def _dtype(state: LocalState) -> torch.dtype:
    return torch.float64 if state.config.dtype == "float64" else torch.float32


def _on(batch: Tensor, dtype: torch.dtype, *vectors: Any) -> tuple[Tensor | None, ...]:
    """Vectors of either kind as tensors beside the batch."""
    return tuple(
        None if vector is None else torch.as_tensor(vector).detach().to(device=batch.device, dtype=dtype)
        for vector in vectors
    )
