"""How the moments of a batch are folded into a layer's running statistics."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from batchnorm_client.errors import InvalidRequest

from .moments import Moments, check_finite
from .state import LayerState

Array = npt.NDArray[Any]

MOST: Final = 2**63 - 1
"""The largest number that a counter, an int64 tensor, can hold."""


def fold(state: LayerState, moments: Moments) -> LayerState:
    """The state after one more batch. A layer whose tracking is off stays as it is.

    Moving statistics follow torch's rule (torch.nn.BatchNorm's note on momentum),

        running = (1 - momentum) * running + momentum * batch

    with the unbiased variance of the batch, and momentum 1/i for the i-th batch when it is None. Population statistics
    are those of all samples (`population`).

    Raises:
        InvalidRequest: a counter would not fit 64 bits any more.
        NonFinite: the folded statistics would not be finite, and the layer rejects that.
    """
    if not state.tracks:
        return state
    batches, samples = state.num_batches_tracked + 1, state.samples_tracked + moments.count
    if max(batches, samples) > MOST:
        raise _overflow(batches, samples)
    with np.errstate(all="ignore"):  # a layer may allow what is not finite
        population = None
        if state.population is None:
            mean, var = _moving(state, moments)
        else:
            population = state.population.fold(moments, state.config.half_life)
            mean, var = population.mean.to(state.dtype).numpy(), population.unbiased_var().to(state.dtype).numpy()
        # A sum of squares is finite only if every term is; it can overflow though all are: `check_finite` looks closer.
        finite = math.isfinite(mean.dot(mean)) and math.isfinite(var.dot(var))
    running_mean, running_var = torch.from_numpy(mean), torch.from_numpy(var)
    if not finite and state.config.non_finite == "reject":
        check_finite(running_mean, "the folded running_mean", "running_mean")
        check_finite(running_var, "the folded running_var", "running_var")
    return state._replace(
        population=population,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=batches,
        samples_tracked=samples,
    )


def _overflow(batches: int, samples: int) -> InvalidRequest:
    name, count = ("num_batches_tracked", batches) if batches > MOST else ("samples_tracked", samples)
    return InvalidRequest(f"{name} would be {count}, over {MOST}", field=name, expected=f"<= {MOST}")


def _moving(state: LayerState, moments: Moments) -> tuple[Array, Array]:
    """The running mean and variance after one more batch.

    In numpy: on C numbers an operation of torch's is mostly call, and every one here is rounded as torch rounds it.
    """
    assert state.running_mean is not None  # noqa: S101 - what tracks means
    assert state.running_var is not None  # noqa: S101
    momentum = 1 / (state.num_batches_tracked + 1) if state.config.momentum is None else state.config.momentum
    old_mean, old_var = state.running_mean.numpy(), state.running_var.numpy()
    dtype = old_mean.dtype
    mean = moments.mean.numpy().astype(dtype, copy=False)
    var = moments.unbiased_var().numpy().astype(dtype, copy=False)
    if moments.strided or dtype == np.float64:
        return _average(old_mean, mean, momentum), _average(old_var, var, momentum)
    # torch's kernel for contiguous float32: momentum, both products and the sum are rounded. But its compiler makes the
    # variance a fused multiply-add: the product with the batch is not rounded. The product of two float32 is exact in
    # float64, so a sum in float64 gives the same.
    weight = np.float32(momentum)
    keep = np.float32(1) - weight
    exact = np.float64(weight) * var.astype(np.float64)
    return keep * old_mean + weight * mean, (keep * old_var + exact).astype(np.float32)


def _average(running: Array, batch: Array, momentum: float) -> Array:
    """(1 - momentum) * running + momentum * batch in float64, rounded once: what torch's strided kernel does."""
    average: Array = (1 - momentum) * running.astype(np.float64) + momentum * batch.astype(np.float64)
    return average.astype(running.dtype)
