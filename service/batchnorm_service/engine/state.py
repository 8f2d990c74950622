"""`LayerState`, a layer's immutable state, and the functions that derive a new state without a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.errors import InvalidRequest, ShapeMismatch
from batchnorm_client.wire.statistics import STATISTICS
from batchnorm_client.wire.tensors import Tensor as WireTensor

from .accumulators import ACCUMULATORS, Accumulator
from .moments import Channels
from .tensors import TORCH_DTYPES, to_torch


class LayerState(NamedTuple):
    """A layer's config, tensors and counters.

    The tensors are on the CPU, in `config.dtype`, and are never written to. A tensor that the layer lacks is None.

    Attributes:
        config: the config, including changes by PATCH.
        weight: gamma, (C,); None unless affine.
        bias: beta, (C,); None unless affine.
        running_mean: (C,); None when the layer was created with `track_running_stats=False`.
        running_var: (C,); unbiased, as in torch; None with running_mean.
        num_batches_tracked: how many batches were folded.
        samples_tracked: how many values per channel were folded (N*H*W each).
        accumulated: data of the layer's `Accumulator` beyond running_mean and running_var; None if it has none.
    """

    config: LayerConfig
    weight: Channels | None
    bias: Channels | None
    running_mean: Channels | None
    running_var: Channels | None
    num_batches_tracked: int = 0
    samples_tracked: int = 0
    accumulated: Any = None

    @property
    def tracks(self) -> bool:
        """Whether training folds into the running statistics."""
        return self.config.track_running_stats and self.running_mean is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state's tensors."""
        return TORCH_DTYPES[self.config.dtype]

    @property
    def accumulator(self) -> Accumulator:
        """The accumulator of the layer's kind of running statistics."""
        return ACCUMULATORS[self.config.statistics]

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


def initial_state(config: LayerConfig) -> LayerState:
    """The state of a new layer, as in torch: weight 1, bias 0, running_mean 0, running_var 1."""
    dtype = TORCH_DTYPES[config.dtype]
    ones, zeros = torch.ones(config.num_features, dtype=dtype), torch.zeros(config.num_features, dtype=dtype)
    tracks = config.track_running_stats
    return LayerState(
        config=config,
        weight=ones if config.affine else None,
        bias=zeros if config.affine else None,
        running_mean=zeros if tracks else None,
        running_var=ones if tracks else None,
        accumulated=ACCUMULATORS[config.statistics].start(config) if tracks else None,
    )


def reset(state: LayerState, what: str) -> LayerState:
    """The state with some tensors set back to initial values.

    Args:
        state: the layer.
        what: "running_stats", like torch's `reset_running_stats` without effect if tracking is off; "parameters":
            weight and bias; "all": both, like torch's `reset_parameters`.
    """
    fresh = initial_state(state.config)
    if what in ("parameters", "all"):
        state = state._replace(weight=fresh.weight, bias=fresh.bias)
    if what in ("running_stats", "all") and state.tracks:
        state = state._replace(
            running_mean=fresh.running_mean,
            running_var=fresh.running_var,
            accumulated=fresh.accumulated,
            num_batches_tracked=0,
            samples_tracked=0,
        )
    return state


def update(state: LayerState, change: LayerUpdate) -> LayerState:
    """The state with the fields of a PATCH set; weight and bias are lists of numbers, or float64 tensors.

    Raises:
        InvalidRequest: this layer does not have the field, or the value is invalid.
        ShapeMismatch: the length of weight or bias is not C.
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
    for field, reason in STATISTICS[state.config.statistics].must_be_null.items():
        if config.get(field) is not None:
            raise InvalidRequest(f"{field} {reason}", field=field, expected=None, got=config[field])
    return state._replace(config=state.config.model_copy(update=config), **tensors)


def _parameter(state: LayerState, field: str, values: list[float] | WireTensor) -> Tensor:
    exact = to_torch(values) if isinstance(values, WireTensor) else torch.tensor(values, dtype=torch.float64)
    if not state.config.affine:
        raise InvalidRequest(f"the layer has no {field}: affine is false", field=field, expected="no such field")
    if len(exact) != state.config.num_features:
        raise ShapeMismatch(
            f"{field} must have {state.config.num_features} numbers, got {len(exact)}",
            field=field,
            expected=[state.config.num_features],
            got=[len(exact)],
        )
    tensor = exact.to(state.dtype)
    if not torch.equal(exact.isfinite(), tensor.isfinite()):
        raise InvalidRequest(
            f"{field} has a number that does not fit {state.config.dtype}", field=field, expected=state.config.dtype
        )
    return tensor


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or torch.equal(a, b)
