"""The moments of a batch on another device than the CPU, in two steps, so that one download fetches all results.

`moments.exact_moments` does both steps for a batch on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from batchnorm_client.kernels.moments import chunks

from .moments import Channels, Moments, merge

_CHUNK: Final = 1 << 24  # elements: 128 MiB in float64, enough to keep a device busy


def launch_moments(batch: Float[Tensor, "N C *rest"]) -> list[Channels]:
    """Mean and biased variance of each chunk of the batch, (C,) float64, alternating, on the batch's device."""
    axes = [axis for axis in range(batch.dim()) if axis != 1]
    vectors = []
    for chunk in chunks(batch, _CHUNK):
        var, mean = torch.var_mean(chunk.double(), axes, correction=0)
        vectors += [mean, var]
    return vectors


def merge_launched(batch: Float[Tensor, "N C *rest"], vectors: Sequence[Channels]) -> Moments:
    """The moments of the batch, in float64 on the CPU, from the downloaded results of `launch_moments`."""
    channels = batch.shape[1]
    counts = [chunk.numel() // channels for chunk in chunks(batch, _CHUNK)]
    parts = zip(counts, vectors[::2], vectors[1::2], strict=True)
    return merge((Moments(count, mean, var, correction=0) for count, mean, var in parts), channels)
