"""What waits in a layer's queue: folds, changes of the state, and the end of the layer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from batchnorm_client.wire.errors import IdempotencyKeyReused, ProblemError, VersionMismatch

from ..engine.state import LayerState
from ..store.base import Receipt
from .idempotency import IdempotencyToken
from .moments_source import MomentsSource
from .records import CommittedLayer

IfMatch = frozenset[int] | None
"""Versions that the caller accepts; None accepts any."""


class Done(NamedTuple):
    """What became of a queued call.

    Attributes:
        layer: the layer as it was committed, or as it is now when nothing needed to be committed.
        version: of the commit that did it.
        batch: `num_batches_tracked` right after it.
        replayed: it had been done before, under the same key.
    """

    layer: CommittedLayer
    version: int
    batch: int
    replayed: bool


@dataclass(slots=True, eq=False)
class Change:
    """A change of the state that is a commit of its own: reset, PATCH, PUT state.

    Attributes:
        token: the claim to be made once.
        apply: the change; it is made anew after each conflict, so that nothing in it should take long.
        if_match: versions that the caller accepts.
        incarnation: of the layer that it was read for, if it depends on that.
        done: set once the change is durable or refused.
    """

    token: IdempotencyToken
    apply: Callable[[LayerState], LayerState]
    if_match: IfMatch = None
    incarnation: int | None = None
    done: asyncio.Future[Done] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, eq=False)
class Fold:
    """A batch whose moments are to be folded.

    Attributes:
        token: the claim to be folded once.
        incarnation: of the layer that the batch was meant for.
        source: its moments, and what depends on the layer's weight, bias and config.
        members: the fingerprints of a group's shards by the keys that their callers gave: each key gets a receipt of
            its own, so that it stands for nothing else.
        done: set once the fold is durable or refused.
    """

    token: IdempotencyToken
    incarnation: int
    source: MomentsSource
    members: dict[bytes, bytes] = field(default_factory=dict)
    done: asyncio.Future[Done] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, eq=False)
class Note:
    """A receipt and nothing else, for one incarnation of the layer."""

    token: IdempotencyToken
    incarnation: int
    payload: bytes
    done: asyncio.Future[Done] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, eq=False)
class Deletion:
    """The end of the layer."""

    if_match: IfMatch = None
    done: asyncio.Future[Done] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


Queued = Fold | Change | Note | Deletion


class ReplacedError(Exception):
    """The layer was deleted and another was created under its name, since the call was prepared for it."""


def check_version(if_match: IfMatch, layer: CommittedLayer) -> None:
    """Raise `VersionMismatch` when `layer` is not one of the versions that the caller accepts."""
    if if_match is not None and layer.stamp.version not in if_match:
        raise VersionMismatch(
            f"the layer has version {layer.stamp.version}",
            field="If-Match",
            expected=layer.stamp.version,
            got=sorted(if_match),
        )


def settle(queued: Queued, result: Done | Exception) -> None:
    """Wake whoever waits for a queued call; a caller that has gone away is passed over."""
    if queued.done.done():
        return
    if isinstance(result, Exception):
        queued.done.set_exception(result)
    else:
        queued.done.set_result(result)


def replay(token: IdempotencyToken, layer: CommittedLayer, receipt: Receipt) -> Done | ProblemError:
    """The answer to a call whose key has a receipt already."""
    try:
        refuse_reuse(token, receipt)
    except IdempotencyKeyReused as error:
        return error
    return Done(layer, receipt.version, receipt.batch, replayed=True)


def refuse_reuse(token: IdempotencyToken, receipt: Receipt) -> None:
    """Raise `IdempotencyKeyReused` when the receipt of this key is for something else."""
    if receipt.fingerprint != token.fingerprint:
        raise IdempotencyKeyReused(
            "this Idempotency-Key was used for another batch or call; make a new key for each",
            field="Idempotency-Key",
            expected="a key that was not used for another batch",
        )
