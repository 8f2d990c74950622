"""How the moments of a batch are folded into a layer's running statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..moments import Moments, check_finite, check_fits
from ..state import LayerState

Array = npt.NDArray[Any]


def fold(state: LayerState, moments: Moments) -> LayerState:
    """The state after one more batch: `fold_all` of one."""
    return fold_all(state, [moments])


def fold_all(state: LayerState, batches: Sequence[Moments]) -> LayerState:
    """The state after more batches, one after the other. A layer whose tracking is off stays as it is.

    Moving statistics follow torch's rule (torch.nn.BatchNorm's note on momentum),

        running = (1 - momentum) * running + momentum * batch

    with the unbiased variance of the batch, and momentum 1/i for the i-th batch when it is None. Population statistics
    are those of all samples (`population`).

    Raises:
        InvalidRequest: a counter would not fit 64 bits any more.
        NonFinite: the folded statistics would not be finite, and the layer rejects that.
    """
    if not (state.tracks and batches):
        return state
    if state.population is not None and len(batches) > 1:  # they may be finite again after one that is refused
        for moments in batches:
            state = fold_all(state, [moments])
        return state
    count = state.num_batches_tracked + len(batches)
    samples = state.samples_tracked + sum([moments.count for moments in batches])
    check_fits("num_batches_tracked", count)
    check_fits("samples_tracked", samples)
    population = state.population
    with np.errstate(all="ignore"):  # a layer may allow what is not finite
        if population is None:
            running = _moving(state, batches)
        else:
            population = population.fold(batches[0], state.config.half_life)
            both = (population.mean.to(state.dtype), population.unbiased_var().to(state.dtype))
            running = np.array([vector.numpy() for vector in both])
        # A sum of squares is finite only if every term is; it can overflow though all are: `check_finite` looks closer.
        # Moving statistics that are not finite never become so again, so what the last batch left tells for all.
        finite = math.isfinite(np.vdot(running, running))
    running_mean, running_var = torch.from_numpy(running[0]), torch.from_numpy(running[1])
    if not finite and state.config.non_finite == "reject":
        check_finite(running_mean, "the folded running_mean", "running_mean")
        check_finite(running_var, "the folded running_var", "running_var")
    return state._replace(
        population=population,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=count,
        samples_tracked=samples,
    )


def _moving(state: LayerState, batches: Sequence[Moments]) -> Array:
    """The running mean and variance, (2, C), after more batches, each rounded as torch rounds it.

    In numpy: on C numbers an operation of torch's is mostly call.
    """
    assert state.running_mean is not None  # noqa: S101 - what tracks means
    assert state.running_var is not None  # noqa: S101
    running = np.array((state.running_mean.numpy(), state.running_var.numpy()))
    share = np.empty(running.shape, np.float64)
    share_of_var = share[1]
    for number, moments in enumerate(batches, state.num_batches_tracked + 1):
        momentum = 1 / number if state.config.momentum is None else state.config.momentum
        mean, var = moments.mean.numpy(), moments.unbiased_var().numpy()
        if mean.dtype != running.dtype:
            mean, var = mean.astype(running.dtype), var.astype(running.dtype)
        if moments.strided or running.dtype == np.float64:  # torch's strided kernel: in float64, rounded once
            share[:] = mean, var
            running[:] = (1 - momentum) * running.astype(np.float64) + momentum * share
            continue
        # torch's kernel for contiguous float32: momentum, both products and the sum are rounded. But its compiler makes
        # the variance a fused multiply-add: the product with the batch is not rounded. The product of two float32 is
        # exact in float64, and a sum in float64 that is then rounded to float32 is the sum in float32.
        weight = np.float32(momentum)
        share[0] = mean * weight
        np.multiply(var, np.float64(weight), out=share_of_var)
        running *= np.float32(1) - weight
        running += share
    return running
