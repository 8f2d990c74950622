"""A layer's tensors by name, as they travel and are kept: torch's state_dict, and what a population adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from batchnorm_client.wire.errors import DtypeMismatch, InvalidRequest, ShapeMismatch, shown
from batchnorm_client.wire.tensors import Tensor as WireTensor

from .accumulators.population import Population
from .state import LayerState
from .tensors import to_torch, to_wire, vector

BATCHES: Final = "num_batches_tracked"
SAMPLES: Final = "samples_tracked"
MEAN: Final = "population_mean"
M2: Final = "population_m2"
WEIGHTS: Final = "population_weights"
"""(2,) float64: the sum of the samples' weights and of their squares; only where a half-life made them differ."""

DERIVED: Final = ("running_mean", "running_var")


def state_dict(state: LayerState) -> dict[str, WireTensor]:
    """The layer's tensors, 8-byte dtypes first (so that every tensor of a safetensors file is aligned)."""
    tensors: dict[str, WireTensor] = {}
    if state.running_mean is not None:
        tensors[BATCHES] = _scalar(state.num_batches_tracked)
    if (population := state.population) is not None:
        tensors |= {SAMPLES: _scalar(state.samples_tracked), MEAN: to_wire(population.mean), M2: to_wire(population.m2)}
        if (population.weight, population.squares) != (state.samples_tracked, state.samples_tracked):
            weights = torch.tensor([population.weight, population.squares], dtype=torch.float64)
            tensors[WEIGHTS] = to_wire(weights)
    return tensors | {name: to_wire(tensor) for name, tensor in state.vectors().items()}


def dtypes(state: LayerState) -> dict[str, str]:
    """The dtype of each tensor that the layer has or takes, by name."""
    known: dict[str, str] = {}
    if state.running_mean is not None:
        known[BATCHES] = "int64"
    if state.population is not None:
        known |= {SAMPLES: "int64", MEAN: "float64", M2: "float64", WEIGHTS: "float64"}
    return known | dict.fromkeys(state.vectors(), state.config.dtype)


def replace_tensors(state: LayerState, tensors: Mapping[str, WireTensor]) -> LayerState:
    """The state with the given tensors instead of its own.

    A population's running statistics follow from its accumulators: given with them they must agree, and alone they are
    refused.

    Raises:
        InvalidRequest: no tensor at all, one that the layer does not have, or a value that cannot be.
        ShapeMismatch, DtypeMismatch: a tensor that is not as the layer's own.
    """
    known = dtypes(state)
    if not tensors:
        raise InvalidRequest("the state has no tensor", field="state", expected=list(known), got=[])
    new: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name not in known:
            raise InvalidRequest(
                f"the layer has no tensor {shown(name)}", field=name[:200], expected=list(known), got=name[:200]
            )
        if name in (BATCHES, SAMPLES):
            new[name] = _count(tensor, name)
        else:
            size = 2 if name == WEIGHTS else state.config.num_features
            new[name] = vector(tensor, name, known[name], size)
    for name in ("running_var", M2, WEIGHTS):
        if name in new and bool((new[name] < 0).any()):
            raise InvalidRequest(f"{name} must not be negative", field=name, expected=">= 0", got="negative")
    if state.population is None:
        return state._replace(**new)
    return _replace_population(state, state.population, new)


def population_of(tensors: Mapping[str, WireTensor], samples: int) -> Population:
    """The accumulators of a record."""
    weight, squares = to_torch(tensors[WEIGHTS]).tolist() if WEIGHTS in tensors else (float(samples), float(samples))
    return Population(to_torch(tensors[MEAN]), to_torch(tensors[M2]), weight, squares)


def scalar(tensors: Mapping[str, WireTensor], name: str) -> int:
    """The counter of that name in a record; 0 where it has none."""
    return int(to_torch(tensors[name])) if name in tensors else 0


def _replace_population(state: LayerState, old: Population, new: dict[str, Any]) -> LayerState:
    given: dict[str, Any] = {name: new.pop(name) for name in (*DERIVED, MEAN, M2, WEIGHTS) if name in new}
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
    if given.keys() - DERIVED or SAMPLES in new:
        after = after.with_population(Population(given.get(MEAN, old.mean), given.get(M2, old.m2), weight, squares))
    for name in DERIVED:
        if name in given and not torch.equal(given[name].nan_to_num(), getattr(after, name).nan_to_num()):
            raise InvalidRequest(
                f"{name} of a population layer follows from {MEAN}, {M2} and {SAMPLES}; set those",
                field=name,
                expected=f"what follows from {MEAN}, {M2} and {SAMPLES}",
            )
    return after


def _check_weights(samples: int, weight: float, squares: float) -> None:
    """Weights are at most 1 each, so their sum is at most the number of samples, and their squares sum to no more."""
    more = 1 + 1e-9  # for what adding them up has rounded
    fits = 0 < squares <= weight * more and weight <= samples * more and weight**2 <= samples * squares * more
    if not (fits if samples else weight == squares == 0):
        raise InvalidRequest(
            f"{WEIGHTS} do not fit {SAMPLES} {samples}",
            field=WEIGHTS,
            expected="the sum of the samples' weights, each at most 1, and of their squares",
            got=[weight, squares],
        )


def _count(tensor: WireTensor, field: str) -> int:
    if tensor.dtype != "int64":
        raise DtypeMismatch(
            f"{field} must be int64, got {tensor.dtype}", field=field, expected="int64", got=tensor.dtype
        )
    if tensor.shape != ():
        raise ShapeMismatch(
            f"{field} must be a scalar, got shape {tensor.shape}", field=field, expected=[], got=list(tensor.shape)
        )
    count = int(to_torch(tensor))
    if count < 0:
        raise InvalidRequest(f"{field} must not be negative", field=field, expected=">= 0", got=count)
    return count


def _scalar(count: int) -> WireTensor:
    return WireTensor("int64", (), count.to_bytes(8, "little", signed=True))
