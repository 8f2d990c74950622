"""How the moments of a batch are folded into a layer's running statistics."""

from __future__ import annotations

from dataclasses import replace

import torch

from .moments import Channels, Moments, check_finite
from .state import LayerState


def fold(state: LayerState, moments: Moments) -> LayerState:
    """The state after one more batch. A layer whose tracking is off stays as it is.

    Moving statistics follow torch's rule (torch.nn.BatchNorm's note on momentum),

        running = (1 - momentum) * running + momentum * batch

    with the unbiased variance of the batch, and momentum 1/i for the i-th batch when it is None. Population statistics
    are those of all samples (`population`).

    Raises:
        NonFinite: the folded statistics would not be finite, and the layer rejects that.
    """
    if not state.tracks:
        return state
    state = _fold_population(state, moments) if state.population is not None else _fold_moving(state, moments)
    if state.config.non_finite == "reject":
        for name in ("running_mean", "running_var"):
            check_finite(getattr(state, name), f"the folded {name}", name)
    return replace(
        state,
        num_batches_tracked=state.num_batches_tracked + 1,
        samples_tracked=state.samples_tracked + moments.count,
    )


def _fold_population(state: LayerState, moments: Moments) -> LayerState:
    assert state.population is not None  # noqa: S101 - the caller asked
    return state.with_population(state.population.fold(moments, state.config.half_life))


def _fold_moving(state: LayerState, moments: Moments) -> LayerState:
    assert state.running_mean is not None  # noqa: S101 - what tracks means
    assert state.running_var is not None  # noqa: S101
    momentum = 1 / (state.num_batches_tracked + 1) if state.config.momentum is None else state.config.momentum
    mean, var = moments.mean.to(state.dtype), moments.unbiased_var().to(state.dtype)
    if moments.strided or state.dtype == torch.float64:
        mean = _average(state.running_mean, mean, momentum)
        var = _average(state.running_var, var, momentum)
    else:
        mean = _average_in_float32(state.running_mean, mean, momentum, fused=False)
        var = _average_in_float32(state.running_var, var, momentum, fused=True)
    return replace(state, running_mean=mean, running_var=var)


def _average(running: Channels, batch: Channels, momentum: float) -> Channels:
    """(1 - momentum) * running + momentum * batch in float64, rounded once: what torch's strided kernel does."""
    return ((1 - momentum) * running.double() + momentum * batch.double()).to(running.dtype)


def _average_in_float32(running: Channels, batch: Channels, momentum: float, *, fused: bool) -> Channels:
    """The same as torch's kernel for contiguous float32 does it: momentum, both products and the sum are rounded.

    With `fused` the product with the batch is not: torch's compiler makes the variance a fused multiply-add. The
    product of two float32 is exact in float64, so a sum in float64 gives the same.
    """
    weight = torch.tensor(momentum, dtype=torch.float32)
    kept = (1 - weight) * running
    if not fused:
        return kept + weight * batch
    return (kept.double() + weight.double() * batch.double()).float()
