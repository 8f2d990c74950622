"""Results of calls with a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic

import numpy.typing as npt

from batchnorm_client.arrays import A
from batchnorm_client.wire.documents import LayerConfig


@dataclass(frozen=True, slots=True, eq=False)
class BatchStatistics(Generic[A]):
    """The statistics that a batch was normalized with: its own in train mode, the running ones in eval mode.

    They have the layer's dtype. A caller that computes the gradient itself needs them.

    Attributes:
        mean: (C,)
        var: (C,), biased: divided by the number of values per channel.
        invstd: (C,), 1 / sqrt(var + eps).
    """

    mean: A
    var: A
    invstd: A


@dataclass(frozen=True, slots=True, eq=False)
class EvalResult(Generic[A]):
    """A batch that was normalized with the running statistics.

    Attributes:
        output: of the input's type, shape, dtype and device; numpy arrays are writable.
        version: of the layer's state that was used.
        num_batches_tracked: of that state.
        digest: of that state; equal digests mean that the same input gives the same output.
        statistics: when they were asked for; None for an empty batch.
    """

    output: A
    version: int
    num_batches_tracked: int
    digest: str
    statistics: BatchStatistics[A] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TrainResult(Generic[A]):
    """A batch whose statistics were folded into the running ones, normalized with its own or with the running ones.

    Attributes:
        output: of the input's type, shape, dtype and device; numpy arrays are writable.
        version: of the commit that folded the batch. Several batches may share one.
        num_batches_tracked: right after this batch, i.e. its position in the order of all batches.
        replayed: the batch had been folded before with the same key, and was not folded again.
        statistics: when they were asked for.
    """

    output: A
    version: int
    num_batches_tracked: int
    replayed: bool = False
    statistics: BatchStatistics[A] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerStates:
    """The states of several layers, each of one commit.

    Attributes:
        tensors: by layer name and by their names in torch's state_dict.
        configs: by layer name.
        versions: by layer name.
        etag: identifies these states.
    """

    tensors: Mapping[str, Mapping[str, npt.NDArray[Any]]]
    configs: Mapping[str, LayerConfig]
    versions: Mapping[str, int]
    etag: str


@dataclass(frozen=True, slots=True, eq=False)
class Replaced:
    """A layer whose tensors were replaced.

    Attributes:
        version: of the commit that replaced them.
        num_batches_tracked: right after it.
    """

    version: int
    num_batches_tracked: int


@dataclass(frozen=True, slots=True, eq=False)
class FoldResult:
    """Moments that were folded into the running statistics.

    Attributes:
        version: of the commit that folded them.
        num_batches_tracked: right after them.
        replayed: they had been folded before with the same key, and were not folded again.
        count: values per channel of all shards of a group; None without a group.
        mean: (C,) float64, of all shards of a group; None without a group.
        var: (C,) float64, biased, of all shards of a group; None without a group.
        folded: how many batches; more than 1 for a stack.
    """

    version: int
    num_batches_tracked: int
    replayed: bool = False
    count: int | None = None
    mean: npt.NDArray[Any] | None = None
    var: npt.NDArray[Any] | None = None
    folded: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Gradients(Generic[A]):
    """The gradients of a backward pass.

    Attributes:
        grad_input: of the input's type, shape, dtype and device.
        grad_weight: (C,), in the layer's dtype; None unless it is affine. In a group, the shard's part of the sum.
        grad_bias: (C,), as grad_weight.
        version: of the layer's state that was used.
        replayed: the group had received this shard before with the same key.
    """

    grad_input: A
    grad_weight: A | None
    grad_bias: A | None
    version: int
    replayed: bool = False
