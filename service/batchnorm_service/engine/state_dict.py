"""A layer's tensors by name, for the API and the store: torch's state_dict, plus those of its `Accumulator`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchnorm_client.wire.errors import DtypeMismatch, InvalidRequest, ShapeMismatch, shown
from batchnorm_client.wire.tensors import Tensor as WireTensor

from .accumulators.base import BATCHES
from .state import LayerState
from .tensors import counter_to_wire, to_torch, to_wire, vector


def state_dict(state: LayerState) -> dict[str, WireTensor]:
    """The layer's tensors, 8-byte dtypes first (so that every tensor of a safetensors file is aligned)."""
    tensors: dict[str, WireTensor] = {}
    if state.running_mean is not None:
        tensors[BATCHES] = counter_to_wire(state.num_batches_tracked)
        tensors |= state.accumulator.tensors(state)
    return tensors | {name: to_wire(tensor) for name, tensor in state.vectors().items()}


def dtypes(state: LayerState) -> dict[str, str]:
    """The dtype of each tensor that the layer can have, by name."""
    return {name: dtype for name, (dtype, _) in layout(state).items()}


def replace_tensors(state: LayerState, tensors: Mapping[str, WireTensor]) -> LayerState:
    """The state with the given tensors replaced.

    Raises:
        InvalidRequest: there is no tensor, one that the layer does not have, or an invalid value.
        ShapeMismatch, DtypeMismatch: a tensor has another shape or dtype than the layer's own.
    """
    known = layout(state)
    if not tensors:
        raise InvalidRequest("the state has no tensor", field="state", expected=list(known), got=[])
    new: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name not in known:
            raise InvalidRequest(
                f"the layer has no tensor {shown(name)}", field=name[:200], expected=list(known), got=name[:200]
            )
        dtype, shape = known[name]
        new[name] = vector(tensor, name, dtype, *shape) if shape else _count(tensor, name)
    if "running_var" in new and bool((new["running_var"] < 0).any()):
        raise InvalidRequest("running_var must not be negative", field="running_var", expected=">= 0", got="negative")
    return state._replace(**new) if state.running_mean is None else state.accumulator.replace(state, new)


def scalar(tensors: Mapping[str, WireTensor], name: str) -> int:
    """The value of a counter in a record; 0 if absent."""
    return int(to_torch(tensors[name])) if name in tensors else 0


def layout(state: LayerState) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of each tensor that the layer can have, by name."""
    channels = state.config.num_features
    known: dict[str, tuple[str, tuple[int, ...]]] = {}
    if state.running_mean is not None:
        known = {BATCHES: ("int64", ()), **state.accumulator.layout(channels)}
    return known | dict.fromkeys(state.vectors(), (state.config.dtype, (channels,)))


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
