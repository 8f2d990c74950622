"""Options and result types of `Layers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.tensors import Tensor


@dataclass(frozen=True, slots=True)
class DriftOptions:
    """How drift is measured.

    Attributes:
        threshold: the score at which drift begins.
        share: of a process's time that measuring the batches of eval may take.
        seconds: between two writes of a layer's drift.
    """

    threshold: float = 0.5
    share: float = 0.01
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class LayersOptions:
    """Limits of `Layers`.

    Attributes:
        device: the device of layers whose config names none.
        max_layers: maximum number of layers in the store.
        max_features: maximum number of features of a new layer.
        resident_layers: maximum number of cached layers; others are loaded from the store when used.
        queue_length: maximum queued updates per layer.
        store_timeout: seconds to retry calls to a store that does not respond.
        inline_bytes: codecs and computations up to this size run on the event loop; larger ones, and all batches on a
            CUDA device, in a thread.
        max_staleness: seconds for which a check of a shared store stays valid; 0: every call checks.
        history_length: how many states of a layer are kept, besides pinned ones.
        history_seconds: between two kept states while batches come.
        max_pins: maximum number of pins of a layer.
        max_waiting_members: maximum number of calls that wait for the other members of their groups, of all layers.
        waiting_calls: maximum number of calls that wait until layers change.
        drift: how drift is measured; None if it is not.
    """

    device: str = "cpu"
    max_layers: int = 1_000_000
    max_features: int = 1 << 20
    resident_layers: int = 10_000
    queue_length: int = 1024
    store_timeout: float = 10.0
    inline_bytes: int = 1 << 20
    max_staleness: float = 0.0
    history_length: int = 20
    history_seconds: float = 60.0
    max_pins: int = 100
    max_waiting_members: int = 1 << 30
    waiting_calls: int = 10_000
    drift: DriftOptions | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A committed state of a layer.

    Attributes:
        name: the layer's name.
        version: the version after the commit.
        config: the config, including changes by PATCH.
        created_at: when the layer was created.
        updated_at: when this state was committed.
        num_batches_tracked: how many batches were folded.
        samples_tracked: how many values per channel were folded.
        tensors: by their names in torch's state_dict; only those that the layer has.
        digest: of the state: see `state_digest`.
        tag: identifies the state among all that the name ever had.
    """

    name: str
    version: int
    config: LayerConfig
    created_at: datetime
    updated_at: datetime
    num_batches_tracked: int
    samples_tracked: int
    tensors: Mapping[str, Tensor]
    digest: str
    tag: str


class Normalized(NamedTuple):
    """A normalized batch.

    Attributes:
        output: in the input's shape and dtype.
        version: in train mode, after the commit that folded the batch; in eval mode, of the state used.
        num_batches_tracked: in train mode, after this batch; in eval mode, of the state used.
        replayed: whether an earlier call with the same key had folded the batch.
        statistics: batch_mean, batch_var (biased) and batch_invstd, (C,) each, if requested.
        digest: in eval mode, of the state used.
    """

    output: Tensor
    version: int
    num_batches_tracked: int
    replayed: bool = False
    statistics: Mapping[str, Tensor] = MappingProxyType({})
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Folded:
    """Result of folding moments.

    Attributes:
        version: the version after the commit that folded them.
        num_batches_tracked: after that fold.
        replayed: whether an earlier call with the same key had folded them.
        rows: how many batches a stack had; None without a stack.
        count: of all shards of a group, in values per channel; None without a group.
        moments: mean and var (biased), (C,) float64, of all shards of a group; empty without a group.
    """

    version: int
    num_batches_tracked: int
    replayed: bool
    rows: int | None = None
    count: int | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Differentiated:
    """Result of a backward pass.

    Attributes:
        gradients: grad_input in the input's shape and dtype; for affine layers also grad_weight and grad_bias, (C,).
        version: of the state used.
        replayed: whether an earlier call with the same key had added this member's shard to the group.
    """

    gradients: Mapping[str, Tensor]
    version: int
    replayed: bool
