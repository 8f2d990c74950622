"""Population statistics: exact mean and unbiased variance of all samples; arithmetic: `kernels.population`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from batchnorm_client.kernels.population import LEAST_FREEDOM, PopulationSums
from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.errors import InvalidRequest
from batchnorm_client.wire.tensors import Tensor as WireTensor

from ..moments import Channels, Moments
from ..moments_stack import MomentsStack
from ..tensors import counter_to_wire, to_torch, to_wire
from .base import SAMPLES, Accumulator, advance

if TYPE_CHECKING:
    from ..state import LayerState

MEAN: Final = "population_mean"
M2: Final = "population_m2"
WEIGHTS: Final = "population_weights"
"""(2,) float64: the sums of the samples' weights and of their squares; absent if every sample has weight 1."""

_DERIVED: Final = ("running_mean", "running_var")
Sums = PopulationSums[Channels]


class Population(Accumulator):
    """Running statistics over all samples; `LayerState.accumulated` is a `PopulationSums`."""

    def start(self, config: LayerConfig) -> Sums:
        """The sums of no samples."""
        zeros = torch.zeros(config.num_features, dtype=torch.float64)
        return PopulationSums(zeros, zeros, 0.0, 0.0)

    def fold(self, state: LayerState, moments: Moments) -> LayerState:
        """The state after one more batch."""
        sums: Sums = state.accumulated
        mean, var = moments.mean.double(), moments.biased_var().double()
        return _advance(state, [moments.count], sums.fold(moments.count, mean, var, state.config.half_life))

    def fold_stack(self, state: LayerState, stack: MomentsStack) -> LayerState:
        """The state after the batches of a stack, merged in one step unless something on the way could overflow."""
        if not _stays_finite(state, stack):
            return super().fold_stack(state, stack)
        old: Sums = state.accumulated
        sums = old.fold_rows(stack.counts, stack.mean, stack.var, state.config.half_life, torch.from_numpy)
        return _advance(state, stack.counts, sums)

    def layout(self, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The sample counter and the sums."""
        return {
            SAMPLES: ("int64", ()),
            MEAN: ("float64", (channels,)),
            M2: ("float64", (channels,)),
            WEIGHTS: ("float64", (2,)),
        }

    def tensors(self, state: LayerState) -> dict[str, WireTensor]:
        """The sample counter and the sums."""
        sums, samples = state.accumulated, state.samples_tracked
        tensors = {SAMPLES: counter_to_wire(samples), MEAN: to_wire(sums.mean), M2: to_wire(sums.m2)}
        if (sums.weight, sums.squares) != (samples, samples):
            tensors[WEIGHTS] = to_wire(torch.tensor([sums.weight, sums.squares], dtype=torch.float64))
        return tensors

    def read(self, tensors: Mapping[str, WireTensor], samples: int) -> Sums:
        """The sums of a record."""
        weight, squares = to_torch(tensors[WEIGHTS]).tolist() if WEIGHTS in tensors else [float(samples)] * 2
        return PopulationSums(to_torch(tensors[MEAN]), to_torch(tensors[M2]), weight, squares)

    def replace(self, state: LayerState, new: dict[str, Any]) -> LayerState:
        """The state with replaced sums. Running statistics are derived from them, and refused if they differ."""
        old: Sums = state.accumulated
        for name in (M2, WEIGHTS):
            if name in new and bool((new[name] < 0).any()):
                raise InvalidRequest(f"{name} must not be negative", field=name, expected=">= 0", got="negative")
        given: dict[str, Any] = {name: new.pop(name) for name in (*_DERIVED, MEAN, M2, WEIGHTS) if name in new}
        samples = new.get(SAMPLES, state.samples_tracked)
        weight, squares = old.weight, old.squares
        if WEIGHTS in given:
            weight, squares = given[WEIGHTS].tolist()
        elif SAMPLES in new:
            weight = squares = float(samples)
        _check_weights(samples, weight, squares)
        if samples == 0:
            given = {MEAN: torch.zeros_like(old.mean), M2: torch.zeros_like(old.m2)} | given
        if samples < 2 and bool((given.get(M2, old.m2) != 0).any()):
            raise InvalidRequest(f"{M2} of fewer than two samples is 0", field=M2, expected=0)
        after = state._replace(**new)
        if given.keys() - _DERIVED or SAMPLES in new:
            sums = PopulationSums(given.get(MEAN, old.mean), given.get(M2, old.m2), weight, squares)
            running_mean, running_var = _running(sums, state.dtype)
            after = after._replace(accumulated=sums, running_mean=running_mean, running_var=running_var)
        for name in _DERIVED:
            if name in given and not torch.equal(given[name].nan_to_num(), getattr(after, name).nan_to_num()):
                raise InvalidRequest(
                    f"{name} of a population layer follows from {MEAN}, {M2} and {SAMPLES}; set those",
                    field=name,
                    expected=f"what follows from {MEAN}, {M2} and {SAMPLES}",
                )
        return after


def _running(sums: Sums, dtype: torch.dtype) -> tuple[Channels, Channels]:
    """The running mean and variance, (C,), in the layer's dtype."""
    return sums.mean.to(dtype), sums.unbiased_var(torch.ones_like(sums.m2)).to(dtype)


def _advance(state: LayerState, counts: Sequence[int], sums: Sums) -> LayerState:
    return advance(state, counts, np.array([vector.numpy() for vector in _running(sums, state.dtype)]), sums)


def _stays_finite(state: LayerState, stack: MomentsStack) -> bool:
    """Whether the statistics are finite after every row, by a bound: each is of samples that these moments describe.

    The variance of samples is at most the largest variance of a batch plus the square of the largest distance of two
    means. Weights may make the unbiased one larger by the threshold in `unbiased_var`.
    """
    sums: Sums = state.accumulated
    old_var = float(sums.m2.max()) / sums.weight if sums.weight else 0.0
    mean = max(float(np.abs(stack.mean).max()), float(sums.mean.abs().max()))
    bound = max(float(stack.var.max()), old_var) + 4 * mean * mean
    return bound < LEAST_FREEDOM * torch.finfo(state.dtype).max


def _check_weights(samples: int, weight: float, squares: float) -> None:
    """Refuse impossible sums of weights: each weight is at most 1, so squares <= weight <= samples."""
    tolerance = 1 + 1e-9  # for rounding errors of the sums
    fits = (
        0 < squares <= weight * tolerance
        and weight <= samples * tolerance
        and weight**2 <= samples * squares * tolerance  # Cauchy-Schwarz
    )
    if not (fits if samples else weight == squares == 0):
        raise InvalidRequest(
            f"{WEIGHTS} do not fit {SAMPLES} {samples}",
            field=WEIGHTS,
            expected="the sum of the samples' weights, each at most 1, and of their squares",
            got=[weight, squares],
        )
