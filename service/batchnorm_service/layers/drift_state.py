"""`DriftState`: the smoothed drift of a layer as the store keeps it, beside the layer's record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

import numpy as np

from batchnorm_client.wire.tensors import Tensor, decode_safetensors, encode_safetensors

from ..engine.drift import Drift, Smoothed, judge, nothing, reference
from .drift_history import DriftHistory, no_history, read_history
from .records import UNREADABLE, CommittedLayer

KEY: Final = "drift"
"""The key of the attachment."""

_FORMAT: Final = "batchnorm-drift/1"
_END_RATIO: Final = 0.5
"""Drift is over when the score falls to this part of the threshold: one that varies around it is reported once."""


@dataclass(frozen=True, slots=True, eq=False)
class DriftState:
    """The drift of a layer.

    Attributes:
        origin: of the statistics that the batches were compared with: see `CommittedLayer`.
        smoothed: the sums over the batches, of all processes.
        history: the drift over time; it goes on when the statistics are set.
        since: when drift began, UTC; None if there is none.
    """

    origin: str
    smoothed: Smoothed
    history: DriftHistory
    since: datetime | None = None


class DriftReport(NamedTuple):
    """The drift of a layer as it is judged.

    Attributes:
        drift: how far the batches are from the running statistics.
        threshold: the score at which drift begins.
        since: when it began, UTC; None if there is none.
        history: the drift over time.
        tag: differs whenever something of this differs.
    """

    drift: Drift
    threshold: float
    since: datetime | None
    history: DriftHistory
    tag: str


class Advanced(NamedTuple):
    """The drift of a layer after further batches.

    Attributes:
        before: the state before them.
        after: the state after them.
        drift: what that shows.
    """

    before: DriftState
    after: DriftState
    drift: Drift


def advance(data: bytes | None, later: Smoothed, layer: CommittedLayer, threshold: float, now: datetime) -> Advanced:
    """The state after later batches.

    Args:
        data: what the store has; None if nothing.
        later: the sums over these batches.
        layer: the newest committed state. If its statistics have another origin, the batches before do not count.
        threshold: the score at which drift begins.
        now: the time.
    """
    channels = layer.state.config.num_features
    before = (None if data is None else unpack(data, channels)) or new_state(layer)
    smoothed = later if before.origin != layer.origin else before.smoothed.then(later)
    drift = judge(smoothed, reference(layer.state, from_start=layer.counted_from_start))
    limit = threshold if before.since is None else threshold * _END_RATIO
    since = (before.since or now) if drift.score >= limit else None
    history = before.history.then(drift, now) if later.batches else before.history
    return Advanced(before, DriftState(layer.origin, smoothed, history, since), drift)


def new_state(layer: CommittedLayer) -> DriftState:
    """The drift of a layer before there is a batch."""
    channels = layer.state.config.num_features
    return DriftState(layer.origin, nothing(channels), no_history(channels))


def pack(state: DriftState) -> bytes:
    """A safetensors file. The sums are rounded to float32, which is far less than their noise."""
    sums = state.smoothed
    numbers = {"batches": sums.batches, "recent": sums.recent.tolist(), "noise": sums.noise.tolist()}
    since = None if state.since is None else state.since.isoformat()
    metadata = {"format": _FORMAT, "drift": json.dumps({"origin": state.origin, "since": since, **numbers})}
    vectors = np.ascontiguousarray(sums.vectors, np.float32)
    return b"".join(encode_safetensors({"sums": Tensor.of(vectors), **state.history.tensors()}, metadata))


def unpack(data: bytes, channels: int) -> DriftState | None:
    """The inverse of `pack`; None for what another release wrote, whose drift is measured anew."""
    try:
        tensors, metadata = decode_safetensors(bytearray(data))
        if metadata["format"] != _FORMAT or tensors["sums"].shape != nothing(channels).vectors.shape:
            return None
        document: dict[str, Any] = json.loads(metadata["drift"])
        recent, noise = np.array(document["recent"], np.float64), np.array(document["noise"], np.float64)
        sums = Smoothed(document["batches"], (0.0, 0.0), recent, noise, tensors["sums"].numpy().astype(np.float64))
        since = None if document["since"] is None else datetime.fromisoformat(document["since"])
        return DriftState(document["origin"], sums, read_history(tensors, channels), since)
    except UNREADABLE:
        return None
