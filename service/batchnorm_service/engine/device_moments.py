"""The moments of a batch that is on another device, in two halves: they share one wait with what else is computed.

`moments.exact_moments` is both halves at once, for a batch on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from batchnorm_client.kernels.moments import chunks

from .moments import Channels, Moments, merge

_PIECE: Final = 1 << 24  # elements: 128 MiB in float64, enough to keep a device busy


def launch_moments(batch: Float[Tensor, "N C *rest"]) -> list[Channels]:
    """Mean and biased variance in float64 of each piece of the batch, one after the other, left on its device."""
    axes = [axis for axis in range(batch.dim()) if axis != 1]
    vectors = []
    for piece in chunks(batch, _PIECE):
        var, mean = torch.var_mean(piece.double(), axes, correction=0)
        vectors += [mean, var]
    return vectors


def merge_launched(batch: Float[Tensor, "N C *rest"], vectors: Sequence[Channels]) -> Moments:
    """The moments of the batch, from what `launch_moments` left behind, fetched. In float64, on the CPU."""
    channels = batch.shape[1]
    counts = [piece.numel() // channels for piece in chunks(batch, _PIECE)]
    parts = zip(counts, vectors[::2], vectors[1::2], strict=True)
    return merge((Moments(count, mean, var, correction=0) for count, mean, var in parts), channels)
