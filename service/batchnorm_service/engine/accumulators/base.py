"""What a kind of running statistics is: `Accumulator`; and `advance`, with which each of its folds ends."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.tensors import Tensor as WireTensor

from ..moments import Moments, check_finite, check_fits

if TYPE_CHECKING:  # a `LayerState` starts with what its kind accumulates
    from ..state import LayerState

Array = npt.NDArray[Any]

BATCHES: Final = "num_batches_tracked"
SAMPLES: Final = "samples_tracked"


class Accumulator(ABC):
    """A kind of running statistics: how the moments of batches become a layer's running mean and variance.

    It has no state of its own. A layer's running_mean and running_var, (C,) in the layer's dtype, and its counters are
    in the `LayerState`; a kind that needs more of the past keeps a value of its own in `LayerState.accumulated`, which
    nobody changes. The methods are called for layers that were created with running statistics, and for no others.
    """

    def start(self, config: LayerConfig) -> Any:
        """What is accumulated before the first batch; None for nothing. running_mean starts as 0, running_var as 1."""
        return None

    @abstractmethod
    def fold(self, state: LayerState, moments: Moments) -> LayerState:
        """The state after one more batch: what `advance` returns.

        Args:
            state: before the batch. Whether its tracking is on has been asked.
            moments: of a batch that has as many values per channel as training such a layer needs.

        Raises:
            InvalidRequest, NonFinite: as `advance` does.
        """

    def fold_many(self, state: LayerState, batches: Sequence[Moments]) -> LayerState:
        """The state after batches that waited together: bit by bit that of `fold`, one after the other.

        For a kind to make faster. The batches must be refused if `fold` would refuse one of them.
        """
        for moments in batches:
            state = self.fold(state, moments)
        return state

    def layout(self, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape, by name, of the tensors that such a layer has or takes beside those of torch's state_dict.

        Only int64 and float64, so that every tensor of a safetensors file is aligned. Shapes are (), which is a counter
        named as in `LayerState`, and (n,).
        """
        return {}

    def tensors(self, state: LayerState) -> dict[str, WireTensor]:
        """Those of `layout` that this layer has, in their order in the record."""
        return {}

    def read(self, tensors: Mapping[str, WireTensor], samples: int) -> Any:
        """What was accumulated over so many samples, of the tensors of a record; None for nothing."""
        return None

    def replace(self, state: LayerState, new: dict[str, Any]) -> LayerState:
        """The state with tensors that a caller sent instead of its own.

        Args:
            state: as it was.
            new: at least one, by name, of the right dtype and shape: torch tensors, and int for a counter. Counters and
                running_var are not negative.

        Raises:
            InvalidRequest: values that no batches could have left.
        """
        return state._replace(**new)


def running_of(state: LayerState) -> Array:
    """The running mean and variance, (2, C), in the layer's dtype; a copy. In numpy, as `advance` takes them."""
    assert state.running_mean is not None  # noqa: S101 - the layer was created with running statistics
    assert state.running_var is not None  # noqa: S101
    return np.array((state.running_mean.numpy(), state.running_var.numpy()))


def advance(state: LayerState, batches: Sequence[Moments], running: Array, accumulated: Any = None) -> LayerState:
    """The state with new running statistics, its counters advanced by the batches that they come from.

    Args:
        state: before the batches.
        batches: what was folded.
        running: (2, C), in the layer's dtype: running mean, and unbiased running variance. In numpy, because on C
            numbers an operation of torch's is mostly call.
        accumulated: what the kind keeps beside them.

    Raises:
        InvalidRequest: a counter would not fit 64 bits any more.
        NonFinite: the running statistics are not finite, and the layer rejects that.
    """
    count = state.num_batches_tracked + len(batches)
    samples = state.samples_tracked + sum([moments.count for moments in batches])
    check_fits(BATCHES, count)
    check_fits(SAMPLES, samples)
    running_mean, running_var = torch.from_numpy(running[0]), torch.from_numpy(running[1])
    # A sum of squares is finite only if every term is; it can overflow though all are: `check_finite` looks closer.
    if not math.isfinite(np.vdot(running, running)) and state.config.non_finite == "reject":
        check_finite(running_mean, "the folded running_mean", "running_mean")
        check_finite(running_var, "the folded running_var", "running_var")
    return state._replace(
        accumulated=accumulated,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=count,
        samples_tracked=samples,
    )
