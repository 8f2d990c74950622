"""The kinds of updates in a layer's queue: folds, changes of the state, receipts, deletions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from batchnorm_client.wire.errors import IdempotencyKeyReused, ProblemError, VersionMismatch

from ..engine.state import LayerState
from ..store.base import Receipt
from ..telemetry import Span
from .idempotency import IdempotencyToken
from .moments_source import MomentsSource
from .records import CommittedLayer

IfMatch = frozenset[int | str] | None
"""The versions, and tags of states (`Stamp.tag`), that satisfy the caller's precondition; None if any does."""


class Done(NamedTuple):
    """Result of an update.

    Attributes:
        layer: the committed layer; if nothing had to be committed, its current state.
        version: the version after the update's commit.
        batch: `num_batches_tracked` after the update.
        replayed: whether an earlier call with the same key had made the update.
    """

    layer: CommittedLayer
    version: int
    batch: int
    replayed: bool


@dataclass(slots=True, eq=False)
class Change:
    """An update with a commit of its own: reset, PATCH, PUT state.

    Attributes:
        token: its idempotency token.
        operation: what it is: see `CommittedLayer`.
        apply: computes the new state; called again after each conflict, so it must be fast.
        if_match: the precondition.
        incarnation: of the layer that the request was decoded for, if it depends on that.
        frequent: whether it may come as often as batches do: see `Retention`.
        span: of the wait for the commit, if the request is sampled.
        future: completed once the change is durable or refused.
    """

    token: IdempotencyToken
    operation: str
    apply: Callable[[LayerState], LayerState]
    if_match: IfMatch = None
    incarnation: int | None = None
    frequent: bool = False
    span: Span | None = None
    future: asyncio.Future[Done] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, eq=False)
class Fold:
    """An update that folds the moments of a batch.

    Attributes:
        token: its idempotency token.
        incarnation: of the layer that the batch was prepared for.
        source: computes the moments.
        members: of a group: the shards' fingerprints by their callers' keys. Each key gets its own receipt, so that it
            cannot be used for another call.
        span: as of a `Change`.
        future: completed once the fold is durable or refused.
    """

    token: IdempotencyToken
    incarnation: int
    source: MomentsSource
    members: dict[bytes, bytes] = field(default_factory=dict)
    span: Span | None = None
    future: asyncio.Future[Done] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, eq=False)
class Note:
    """An update that writes a receipt and nothing else, for one incarnation of the layer."""

    token: IdempotencyToken
    incarnation: int
    payload: bytes
    span: Span | None = None
    future: asyncio.Future[Done] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, eq=False)
class Deletion:
    """An update that deletes the layer; one with pins only if `with_pins`."""

    if_match: IfMatch = None
    with_pins: bool = False
    span: Span | None = None
    future: asyncio.Future[Done] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


Queued = Fold | Change | Note | Deletion


class ReplacedError(Exception):
    """The layer was deleted, and perhaps created again, after the call was prepared for it."""


def check_version(if_match: IfMatch, layer: CommittedLayer) -> None:
    """Raise `VersionMismatch` unless the layer's version or state satisfies the precondition."""
    if if_match is not None and if_match.isdisjoint((layer.stamp.version, layer.stamp.tag)):
        raise VersionMismatch(
            f"the layer has version {layer.stamp.version}",
            field="If-Match",
            expected=layer.stamp.version,
            got=sorted(if_match, key=str),
        )


def settle(queued: Queued, result: Done | Exception) -> None:
    """Complete an update's future, unless its caller was cancelled."""
    if queued.future.done():
        return
    if isinstance(result, Exception):
        queued.future.set_exception(result)
    else:
        queued.future.set_result(result)


def replay(token: IdempotencyToken, layer: CommittedLayer, receipt: Receipt) -> Done | ProblemError:
    """The result of a call whose key has a receipt already: that of the first call, or the refusal of a reused key."""
    try:
        refuse_reuse(token, receipt)
    except IdempotencyKeyReused as error:
        return error
    return Done(layer, receipt.version, receipt.batch, replayed=True)


def refuse_reuse(token: IdempotencyToken, receipt: Receipt) -> None:
    """Raise `IdempotencyKeyReused` if this key's receipt is for another call."""
    if receipt.fingerprint != token.fingerprint:
        raise IdempotencyKeyReused(
            "this Idempotency-Key was used for another batch or call; make a new key for each",
            field="Idempotency-Key",
            expected="a key that was not used for another batch",
        )
