"""What `Layers` is told and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.tensors import Tensor


@dataclass(frozen=True, slots=True)
class LayersOptions:
    """What bounds and places the work.

    Attributes:
        device: where layers live whose config names no device.
        max_layers: how many layers the store may hold.
        resident_layers: how many layers stay in memory; others are loaded again when they are used.
        queue_length: how many calls may wait for one layer's commits.
        store_timeout: seconds for which a call waits for a store that does not answer.
        inline_bytes: bodies up to this size are read and written, and batches computed, on the event loop; larger ones
            and batches for a CUDA device in a thread.
        max_staleness: seconds for which a look at a shared store counts; 0: every call looks.
    """

    device: str = "cpu"
    max_layers: int = 1_000_000
    resident_layers: int = 10_000
    queue_length: int = 1024
    store_timeout: float = 10.0
    inline_bytes: int = 1 << 20
    max_staleness: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A layer as it was committed.

    Attributes:
        name: of the layer.
        version: of the commit.
        config: with what PATCH changed since the layer was made.
        created_at: when it was made.
        updated_at: when it was committed.
        num_batches_tracked: how many batches were folded.
        samples_tracked: how many values per channel were folded.
        tensors: by their names in torch's state_dict; those that the config leaves out are absent.
    """

    name: str
    version: int
    config: LayerConfig
    created_at: datetime
    updated_at: datetime
    num_batches_tracked: int
    samples_tracked: int
    tensors: Mapping[str, Tensor]


class Normalized(NamedTuple):
    """A normalized batch.

    Attributes:
        output: as the input in shape and dtype.
        version: in train mode of the commit that folded the batch, in eval mode of the state that was used.
        num_batches_tracked: in train mode after this batch, in eval mode of the state that was used.
        replayed: the batch had been folded before, under the same key.
        statistics: batch_mean, batch_var (biased) and batch_invstd, (C,) each, when they were asked for.
    """

    output: Tensor
    version: int
    num_batches_tracked: int
    replayed: bool = False
    statistics: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Folded:
    """Moments that were folded.

    Attributes:
        version: of the commit that folded them.
        num_batches_tracked: after them.
        replayed: they had been folded before, under the same key.
        count: of all shards of a group; None for moments that are no shard.
        moments: mean and var (biased), (C,) float64, of all shards of a group.
    """

    version: int
    num_batches_tracked: int
    replayed: bool
    count: int | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Differentiated:
    """A backward pass.

    Attributes:
        gradients: grad_input, and grad_weight and grad_bias where the layer is affine.
        version: of the state that was used.
        replayed: the group had been closed before, and this member had its part in it.
    """

    gradients: Mapping[str, Tensor]
    version: int
    replayed: bool
