"""Encodes layers as records: a safetensors file with torch's state_dict names, and the config as its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Final

from batchnorm_client.wire.documents import LayerConfig, LayerSummary
from batchnorm_client.wire.errors import ProblemError
from batchnorm_client.wire.tensors import Tensor, decode_safetensors, decode_safetensors_header, encode_safetensors

from ..engine.accumulators import ACCUMULATORS
from ..engine.accumulators.base import BATCHES, SAMPLES
from ..engine.digest import digest
from ..engine.state import LayerState
from ..engine.state_dict import layout, scalar, state_dict
from ..engine.tensors import to_torch
from ..runtime import Runtime
from ..store.base import HEAD_BYTES, Entry, Record, Stamp

FORMAT: Final = "batchnorm-layer/1"
RESET: Final = "reset"
"""The operation that sets statistics to their initial values."""
UNREADABLE: Final = (ProblemError, LookupError, TypeError, ValueError)
"""Raised by damaged bytes, or those of another version. A `ProblemError` would be reported as the client's error."""


@dataclass(frozen=True, eq=False)
class CommittedLayer:
    """A committed layer in memory.

    Attributes:
        stamp: the record's stamp.
        state: config, tensors and counters.
        created_config: the config at creation: repeating the PUT with it is allowed.
        created_at: when the layer was created.
        updated_at: when this state was computed.
        operation: what made this state: create, train (also of several batches, and moments), update (PATCH), reset,
            replace (PUT state) or rollback; "unknown" if an older release did.
        kept_at: when a state of the layer was last kept, or the layer was created.
        origin: where the running statistics started, before batches were folded into them: the name and the tag of the
            operation that set them; empty if none did since the layer was created.
    """

    stamp: Stamp
    state: LayerState
    created_config: LayerConfig
    created_at: datetime
    updated_at: datetime
    operation: str
    kept_at: datetime
    origin: str = ""

    @property
    def counted_from_start(self) -> bool:
        """Whether the statistics started from their initial values, and all batches had the present momentum."""
        started = not self.origin or self.origin.startswith(f"{RESET} ")
        return started and self.state.config.momentum == self.created_config.momentum

    @cached_property
    def digest(self) -> str:
        """The state's digest."""
        return digest(self.state)


def config_text(layer: CommittedLayer) -> str:
    """The layer's config as JSON."""
    return _dump(layer.state.config)


def now(runtime: Runtime) -> datetime:
    """The wall clock's time, in UTC."""
    return datetime.fromtimestamp(runtime.wall(), UTC)


def encode_new(state: LayerState, at: datetime) -> bytes:
    """The bytes of a new layer's record."""
    return record(CommittedLayer(Stamp(0, 0, 0), state, state.config, at, at, "create", at)).data


def record(layer: CommittedLayer) -> Record:
    """The record of a layer in memory."""
    metadata = {
        "format": FORMAT,
        "config": _dump(layer.state.config),
        "created_config": _dump(layer.created_config),
        "created_at": layer.created_at.isoformat(),
        "updated_at": layer.updated_at.isoformat(),
        "operation": layer.operation,
        "kept_at": layer.kept_at.isoformat(),
        "origin": layer.origin,
        SAMPLES: str(layer.state.samples_tracked),
    }
    return Record(layer.stamp, b"".join(encode_safetensors(state_dict(layer.state), metadata)))


def decode(stored: Record) -> CommittedLayer:
    """The layer of a record. Raises `ValueError` when it is damaged, or another version of this software wrote it."""
    try:
        return _decode(stored)
    except UNREADABLE as error:
        raise ValueError(f"the record cannot be read: {error!r}") from error


def _decode(stored: Record) -> CommittedLayer:
    tensors, metadata = decode_safetensors(bytearray(stored.data))
    _check_format(metadata)
    config, created_config = _load(metadata["config"]), _load(metadata["created_config"])
    samples, tracked = int(metadata[SAMPLES]), created_config.track_running_stats
    vectors = {name: to_torch(tensors[name]) for name in _vector_names(config, created_config)}
    state = LayerState(
        config=config,
        weight=vectors.get("weight"),
        bias=vectors.get("bias"),
        running_mean=vectors.get("running_mean"),
        running_var=vectors.get("running_var"),
        num_batches_tracked=scalar(tensors, BATCHES),
        samples_tracked=samples,
        accumulated=ACCUMULATORS[config.statistics].read(tensors, samples) if tracked else None,
    )
    _check_layout(state, tensors)
    return CommittedLayer(
        stamp=stored.stamp,
        state=state,
        created_config=created_config,
        created_at=datetime.fromisoformat(metadata["created_at"]),
        updated_at=datetime.fromisoformat(metadata["updated_at"]),
        operation=metadata.get("operation", "unknown"),
        kept_at=datetime.fromisoformat(metadata.get("kept_at", metadata["created_at"])),
        origin=metadata.get("origin", ""),
    )


def summary(entry: Entry) -> LayerSummary:
    """An entry of a listing, from the first `HEAD_BYTES` bytes of a record. Raises `ValueError` as `decode` does."""
    try:
        return _summary(entry)
    except UNREADABLE as error:
        raise ValueError(f"the record of {entry.name} cannot be read: {error!r}") from error


def _summary(entry: Entry) -> LayerSummary:
    header, start = decode_safetensors_header(entry.head)
    metadata = header["__metadata__"]
    _check_format(metadata)
    count = 0
    if BATCHES in header:
        begin, end = header[BATCHES]["data_offsets"]
        count = int.from_bytes(entry.head[start + begin : start + end], "little", signed=True)
    return LayerSummary(
        name=entry.name,
        num_features=_load(metadata["config"]).num_features,
        version=entry.stamp.version,
        num_batches_tracked=count,
        updated_at=datetime.fromisoformat(metadata["updated_at"]),
    )


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"the record's format is {metadata.get('format')!r}, this version reads {FORMAT!r}")


def _vector_names(config: LayerConfig, created_config: LayerConfig) -> tuple[str, ...]:
    parameters = ("weight", "bias") if config.affine else ()
    return (*parameters, "running_mean", "running_var") if created_config.track_running_stats else parameters


def _check_layout(state: LayerState, tensors: Mapping[str, Tensor]) -> None:
    """A damaged record must not become a layer whose tensors do not fit its config."""
    for name, (dtype, shape) in layout(state).items():
        if name in tensors and (tensors[name].dtype, tensors[name].shape) != (dtype, shape):
            raise ValueError(f"{name} is {tensors[name].dtype} of shape {tensors[name].shape}, not {dtype} of {shape}")


@lru_cache(maxsize=4096)
def _dump(config: LayerConfig) -> str:
    return json.dumps(config.model_dump(), separators=(",", ":"))


@lru_cache(maxsize=4096)
def _load(text: str) -> LayerConfig:
    return LayerConfig.model_validate_json(text)


assert len(_dump(LayerConfig(num_features=1))) * 2 + 1024 < HEAD_BYTES  # noqa: S101 - a listing reads only the head
