"""Normalizing with numpy: see `core.local.Kernels`. Sums are taken in float64, so half precision loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm_client.kernels.moments import BatchMoments, Sums, merge_chunks
from batchnorm_client.kernels.state import LocalState

Array = npt.NDArray[Any]
Statistics = tuple[Array, Array, Array]


def with_own_statistics(state: LocalState, batch: Array) -> tuple[Array, BatchMoments, Callable[[], Statistics]]:
    """Normalize (N, C, *) with its own statistics."""
    found = moments(batch)
    output = with_statistics(state, batch, found.mean, found.var)
    return output, found, lambda: statistics(state, batch, found.mean, found.var)


def with_statistics(state: LocalState, batch: Array, mean: Array, var: Array) -> Array:
    """Normalize (N, C, *) with a mean and a biased variance, (C,), of any float dtype."""
    dtype = np.dtype(state.config.dtype)
    with np.errstate(all="ignore"):  # the layer's `non_finite` decides whether NaN and overflow are errors
        invstd = _invstd(state, var)
        scale = invstd if state.weight is None else invstd * state.weight
        # Subtract the mean first: `input * scale + shift` would lose small differences if the offset is large.
        centered = batch.astype(dtype) - _per_channel(mean.astype(dtype), batch)
        rest = mean.astype(np.float64) - mean.astype(dtype)
        offset = (np.zeros_like(scale) if state.bias is None else state.bias) - rest * scale
        centered *= _per_channel(scale.astype(dtype), batch)
        centered += _per_channel(offset.astype(dtype), batch)
        return centered.astype(batch.dtype, copy=False)


def statistics(state: LocalState, _batch: Array, mean: Array, var: Array) -> Statistics:
    """The statistics that `with_statistics` normalizes with, in the layer's dtype."""
    dtype = np.dtype(state.config.dtype)
    with np.errstate(all="ignore"):
        return mean.astype(dtype), var.astype(dtype), _invstd(state, var).astype(dtype)


def moments(batch: Array) -> BatchMoments:
    """The moments of (N, C, *) in float64; zeros for an empty batch."""
    channels = batch.shape[1]
    axes = tuple(axis for axis in range(batch.ndim) if axis != 1)

    def chunk_sums(chunk: Array) -> Sums[Array]:
        wide, count = chunk.astype(np.float64), chunk.size // channels
        return Sums(count, wide.mean(axes), wide.var(axes) * count)

    with np.errstate(all="ignore"):
        count, mean, m2 = merge_chunks(batch, chunk_sums, Sums(0, np.zeros(channels), np.zeros(channels)))
        return BatchMoments(int(count), mean, m2 / max(1, count))


def move(batch: Array, source: int, destination: int) -> Array:
    """Move an axis."""
    return np.moveaxis(batch, source, destination)


def clip(batch: Array, bound: float) -> Array:
    """Clamp; a bound above the dtype's largest number is replaced by that number."""
    bound = min(bound, float(np.finfo(batch.dtype).max))
    return np.clip(batch, -bound, bound)


def all_finite(batch: Array) -> bool:
    """Whether it contains neither NaN nor infinity."""
    return bool(np.isfinite(batch).all())


def _invstd(state: LocalState, var: Array) -> Array:
    return 1 / np.sqrt(var.astype(np.float64) + state.config.eps)


def _per_channel(vector: Array, batch: Array) -> Array:
    return vector.reshape(-1, *[1] * (batch.ndim - 2))
