"""`LayerState`: what a layer is at one moment, and the changes that need no batch. A change is a new state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from batchnorm_client.contract import LayerConfig, LayerUpdate
from batchnorm_client.errors import DtypeMismatch, InvalidRequest, ShapeMismatch
from batchnorm_client.tensors import Tensor as WireTensor

from .tensors import TORCH_DTYPES, to_torch, to_wire, vector

Channels = Float[Tensor, "C"]

COUNTER: Final = "num_batches_tracked"


@dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """A layer's config, tensors and counters.

    The tensors live on the CPU in `config.dtype`; nobody writes into them. A tensor that the config leaves out is None.

    Attributes:
        config: the config, with what PATCH changed since the layer was made.
        weight: gamma, (C,); None unless affine.
        bias: beta, (C,); None unless affine.
        running_mean: (C,); None when the layer was created with `track_running_stats=False`.
        running_var: (C,); unbiased, as in torch; None with running_mean.
        num_batches_tracked: how many batches were folded.
        samples_tracked: how many values per channel were folded (N*H*W each).
    """

    config: LayerConfig
    weight: Channels | None
    bias: Channels | None
    running_mean: Channels | None
    running_var: Channels | None
    num_batches_tracked: int = 0
    samples_tracked: int = 0

    @property
    def tracks(self) -> bool:
        """Whether training folds into the running statistics."""
        return self.config.track_running_stats and self.running_mean is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state's tensors."""
        return TORCH_DTYPES[self.config.dtype]

    def normalizes_like(self, other: LayerState) -> bool:
        """Whether a training batch gives the same output and the same refusals under both states."""
        return self is other or (
            (self.config is other.config or self.config == other.config)
            and _same(self.weight, other.weight)
            and _same(self.bias, other.bias)
        )

    def vectors(self) -> dict[str, Channels]:
        """The (C,) tensors that the layer has, by their names in torch's state_dict."""
        named = {
            "weight": self.weight,
            "bias": self.bias,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def state_dict(self) -> dict[str, WireTensor]:
        """The tensors as they travel and are kept, names as in `nn.BatchNorm*.state_dict()`; 8-byte dtypes first."""
        tensors = {name: to_wire(tensor) for name, tensor in self.vectors().items()}
        if self.running_mean is None:
            return tensors
        return {COUNTER: _scalar(self.num_batches_tracked), **tensors}

    def dtypes(self) -> dict[str, str]:
        """The dtype of each tensor of `state_dict`, by name."""
        dtypes: dict[str, str] = dict.fromkeys(self.vectors(), self.config.dtype)
        return dtypes if self.running_mean is None else {COUNTER: "int64", **dtypes}


def initial_state(config: LayerConfig) -> LayerState:
    """A layer as torch makes it: weight 1, bias 0, running_mean 0, running_var 1."""
    dtype = TORCH_DTYPES[config.dtype]
    ones, zeros = torch.ones(config.num_features, dtype=dtype), torch.zeros(config.num_features, dtype=dtype)
    tracks = config.track_running_stats
    return LayerState(
        config=config,
        weight=ones if config.affine else None,
        bias=zeros if config.affine else None,
        running_mean=zeros if tracks else None,
        running_var=ones if tracks else None,
    )


def reset(state: LayerState, what: str) -> LayerState:
    """The state with initial values again.

    Args:
        state: the layer.
        what: "running_stats" as torch's `reset_running_stats`, which leaves a layer alone whose tracking is off;
            "parameters": weight and bias; "all": both, as torch's `reset_parameters`.
    """
    fresh = initial_state(state.config)
    if what in ("parameters", "all"):
        state = replace(state, weight=fresh.weight, bias=fresh.bias)
    if what in ("running_stats", "all") and state.tracks:
        state = replace(
            state,
            running_mean=fresh.running_mean,
            running_var=fresh.running_var,
            num_batches_tracked=0,
            samples_tracked=0,
        )
    return state


def update(state: LayerState, change: LayerUpdate) -> LayerState:
    """The state with the given fields set.

    Raises:
        InvalidRequest: a field that this layer does not have, or that cannot have that value.
        ShapeMismatch: weight or bias of another length than C.
    """
    config: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for field, value in change.given():
        if field in ("weight", "bias"):
            tensors[field] = _parameter(state, field, value)
        else:
            config[field] = value
    if config.get("track_running_stats") and state.running_mean is None:
        raise InvalidRequest(
            "track_running_stats cannot be turned on: the layer was created without running statistics",
            field="track_running_stats",
            expected=False,
            got=True,
        )
    if config.get("momentum") is not None and state.config.statistics == "population":
        raise InvalidRequest(
            "momentum must be null for population statistics: every sample has the same weight",
            field="momentum",
            expected=None,
            got=config["momentum"],
        )
    return replace(state, config=state.config.model_copy(update=config), **tensors)


def replace_tensors(state: LayerState, tensors: Mapping[str, WireTensor]) -> LayerState:
    """The state with the given tensors instead of its own, names as in `state_dict`.

    Raises:
        InvalidRequest: no tensor at all, one that the layer does not have, or a value that cannot be.
        ShapeMismatch, DtypeMismatch: a tensor that is not as the layer's own.
    """
    if not tensors:
        raise InvalidRequest("the state has no tensor", field="state", expected=list(state.dtypes()), got=[])
    new: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name not in state.dtypes():
            raise InvalidRequest(
                f"the layer has no tensor {name!r}", field=name, expected=list(state.dtypes()), got=name
            )
        new[name] = (
            _count(tensor, name)
            if name == COUNTER
            else vector(tensor, name, state.config.dtype, state.config.num_features)
        )
    if "running_var" in new and bool((new["running_var"] < 0).any()):
        raise InvalidRequest("running_var must not be negative", field="running_var", expected=">= 0", got="negative")
    return replace(state, **new)


def _parameter(state: LayerState, field: str, values: list[float]) -> Tensor:
    if not state.config.affine:
        raise InvalidRequest(f"the layer has no {field}: affine is false", field=field, expected="no such field")
    if len(values) != state.config.num_features:
        raise ShapeMismatch(
            f"{field} must have {state.config.num_features} numbers, got {len(values)}",
            field=field,
            expected=[state.config.num_features],
            got=[len(values)],
        )
    exact = torch.tensor(values, dtype=torch.float64)
    tensor = exact.to(state.dtype)
    if not torch.equal(exact.isfinite(), tensor.isfinite()):
        raise InvalidRequest(
            f"{field} has a number that does not fit {state.config.dtype}", field=field, expected=state.config.dtype
        )
    return tensor


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


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or torch.equal(a, b)
