"""`Accumulator`, the base class of kinds of running statistics, and `advance`, which ends each of their folds."""

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
from ..moments_stack import MomentsStack

if TYPE_CHECKING:  # `state` imports the accumulators
    from ..state import LayerState

Array = npt.NDArray[Any]

BATCHES: Final = "num_batches_tracked"
SAMPLES: Final = "samples_tracked"


class Accumulator(ABC):
    """A kind of running statistics: how the moments of batches become a layer's running mean and variance.

    Accumulators are stateless. A layer's running_mean and running_var, (C,) in the layer's dtype, and its counters are
    in the `LayerState`. A kind that needs more data keeps it in `LayerState.accumulated`, an immutable value. The
    methods are called only for layers that were created with running statistics.
    """

    def start(self, config: LayerConfig) -> Any:
        """The initial `LayerState.accumulated`; None for none. running_mean starts as 0, running_var as 1."""
        return None

    @abstractmethod
    def fold(self, state: LayerState, moments: Moments) -> LayerState:
        """The state after one more batch: what `advance` returns.

        Args:
            state: before the batch; its tracking is on.
            moments: of a batch with enough values per channel for training.

        Raises:
            InvalidRequest, NonFinite: as `advance` does.
        """

    def fold_many(self, state: LayerState, batches: Sequence[Moments]) -> LayerState:
        """The state after several batches, bit-equal to folding them one by one.

        Override it to be faster. It must raise if `fold` would raise for any of the batches.
        """
        for moments in batches:
            state = self.fold(state, moments)
        return state

    def fold_stack(self, state: LayerState, stack: MomentsStack) -> LayerState:
        """The state after the batches of a stack, in their order: that of `fold_many`, or within 1e-12 of it.

        Override it to be faster. It must raise if `fold` would raise for any of the batches.
        """
        return self.fold_many(state, list(stack.rows()))

    def layout(self, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape, by name, of a layer's tensors beyond those in torch's state_dict.

        Only int64 and float64, so that every tensor of a safetensors file is aligned. Shapes are (), for a counter
        named as in `LayerState`, or (n,).
        """
        return {}

    def tensors(self, state: LayerState) -> dict[str, WireTensor]:
        """The tensors of `layout` that this layer has, in the order of the record."""
        return {}

    def read(self, tensors: Mapping[str, WireTensor], samples: int) -> Any:
        """Decode `LayerState.accumulated` from a record's tensors and its number of samples; None for none."""
        return None

    def replace(self, state: LayerState, new: dict[str, Any]) -> LayerState:
        """The state with some tensors replaced by a caller's.

        Args:
            state: the current state.
            new: at least one tensor by name, of the right dtype and shape; int for a counter. Counters and running_var
                are not negative.

        Raises:
            InvalidRequest: the values are inconsistent.
        """
        return state._replace(**new)


def running_of(state: LayerState) -> Array:
    """A copy of the running mean and variance as a numpy array, (2, C), in the layer's dtype, for `advance`."""
    assert state.running_mean is not None  # noqa: S101 - the layer was created with running statistics
    assert state.running_var is not None  # noqa: S101
    return np.array((state.running_mean.numpy(), state.running_var.numpy()))


def advance(state: LayerState, counts: Sequence[int], running: Array, accumulated: Any = None) -> LayerState:
    """The state with new running statistics, and counters advanced by the folded batches.

    Args:
        state: before the batches.
        counts: values per channel of each folded batch.
        running: (2, C), in the layer's dtype: running mean, and unbiased running variance. In numpy, whose operations
            on C numbers have less overhead than torch's.
        accumulated: the new `LayerState.accumulated`.

    Raises:
        InvalidRequest: a counter would exceed 64 bits.
        NonFinite: the running statistics are not finite, and the layer rejects that.
    """
    count = state.num_batches_tracked + len(counts)
    samples = state.samples_tracked + sum(counts)
    check_fits(BATCHES, count)
    check_fits(SAMPLES, samples)
    running_mean, running_var = torch.from_numpy(running[0]), torch.from_numpy(running[1])
    # A finite sum of squares has finite terms. It can also overflow with finite terms: `check_finite` decides then.
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
