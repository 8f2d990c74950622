"""A layer's history: lists kept states, and pins some under tags."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from batchnorm_client.wire.documents import HistoryEntry, HistoryPage, Pin, Pins
from batchnorm_client.wire.errors import PinExists, TooManyPins, VersionNotFound

from ..runtime import Runtime
from ..store import base
from ..store.base import Committed, Full, Missing, NotKept, Pinned, Receipt, Stamp, Store
from .cache import CacheEntry, LayerCache
from .cached_state import layer_not_found
from .compute import ComputeExecutor
from .idempotency import IdempotencyToken, make_token
from .kept_states import version_not_found
from .records import CommittedLayer, decode, now
from .results import LayersOptions
from .updates import refuse_reuse

_DESCRIBED: Final = 2_000
"""Entries of states in memory, of all layers together: about 1 KiB each. A state with a million channels takes 40 ms to
load and digest, and a stamp stands for the same state for ever."""


class History:
    """Operations on the kept states of named layers."""

    def __init__(
        self, store: Store, cache: LayerCache, executor: ComputeExecutor, options: LayersOptions, runtime: Runtime
    ) -> None:
        self._store = store
        self._cache = cache
        self._executor = executor
        self._options = options
        self._runtime = runtime
        self._described: OrderedDict[Stamp, HistoryEntry] = OrderedDict()

    async def names(self, name: str) -> tuple[Sequence[int], Sequence[str]]:
        """The versions of the newest and of the kept states, newest first, and the tags of the pins."""
        with self._cache.use(name) as entry:
            newest = (await entry.cached.fresh()).stamp.version
            versions = sorted({newest, *await self._kept(entry)}, reverse=True)
            return versions, [pin.tag for pin in await self._pins(entry)]

    async def list(self, name: str, limit: int, before: int | None) -> HistoryPage:
        """The newest state and those that are kept: up to `limit` with versions below `before`, newest first."""
        with self._cache.use(name) as entry:
            newest = await entry.cached.fresh()
            stamps = await self._kept(entry) | {newest.stamp.version: newest.stamp}
            versions = sorted((each for each in stamps if before is None or each < before), reverse=True)
            found: list[HistoryEntry] = []
            for version in versions[:limit]:
                with suppress(VersionNotFound):  # no longer kept since the versions were listed
                    found.append(await self._entry(entry, stamps[version], newest))
        return HistoryPage(history=found, next=versions[limit - 1] if len(versions) > limit else None)

    async def pin(self, name: str, tag: str, version: int | None, key: str | None) -> tuple[Pin, bool]:
        """Keep a state under a tag until `unpin`. Returns the pin, and whether it is new.

        Args:
            name: the layer.
            tag: unique within the layer.
            version: of the newest or a kept state; None for the newest.
            key: the call's Idempotency-Key. A repeat with it returns the pin that the first call made.
        """
        token = make_token(self._runtime, key, f"pin {tag} {version}")
        data, limit = _pack(now(self._runtime), token), self._options.max_pins
        with self._cache.use(name) as entry:
            stamp = None if version is None else (await entry.kept.get(version, "version")).stamp
            while True:
                outcome, _ = await entry.calls.retry(lambda: self._store.pin(name, stamp, tag, data, limit))
                match outcome:
                    case Committed(pinned=record):
                        assert record is not None  # noqa: S101 - of a pin
                        digest = await self._executor.digest(decode(record))
                        return _document(base.Pin(tag, record.stamp.version, data), digest), True
                    case Missing():
                        raise layer_not_found(name)
                    case NotKept():
                        raise version_not_found(name, version or tag, "version")
                    case Full():
                        raise TooManyPins(
                            f"layer {name!r} has {limit} pins, as many as BATCHNORM_MAX_PINS allows",
                            field="tag",
                            expected=limit,
                        )
                    case Pinned(found) if found is not None:
                        mine = found.data == data  # its reply was lost
                        if not mine:
                            newest = version or (await entry.cached.fresh()).stamp.version
                            _check_same(name, found, token, newest)
                        if documents := (await self._documents(entry, [found])).pins:
                            return documents[0], mine
                        # It was deleted meanwhile, so there is no such pin: make it.

    async def pins(self, name: str) -> Pins:
        """All pins, by tag."""
        with self._cache.use(name) as entry:
            return await self._documents(entry, await self._pins(entry))

    async def get_pin(self, name: str, tag: str) -> Pin:
        """The pin of a tag. Raises `VersionNotFound` if there is none."""
        with self._cache.use(name) as entry:
            pins = [pin for pin in await self._pins(entry) if pin.tag == tag]
            if documents := (await self._documents(entry, pins)).pins:
                return documents[0]
        raise version_not_found(name, tag, "tag")

    async def unpin(self, name: str, tag: str) -> None:
        """Delete a pin. Its state stays as long as those that are kept without one."""
        with self._cache.use(name) as entry:
            layer = await entry.cached.fresh()
            length = self._options.history_length
            try:
                outcome, repeated = await entry.calls.retry(
                    lambda: self._store.unpin(name, layer.stamp.incarnation, tag, length)
                )
            finally:  # it may have taken effect, whatever is raised
                entry.kept.forget()
            if isinstance(outcome, Missing):
                raise layer_not_found(name)
            if isinstance(outcome, NotKept) and not repeated:
                raise version_not_found(name, tag, "tag")

    async def _entry(self, entry: CacheEntry, stamp: Stamp, newest: CommittedLayer | None = None) -> HistoryEntry:
        """What the history says of a state. Raises `VersionNotFound` if it is neither `newest` nor kept any more."""
        if (known := self._described.get(stamp)) is not None:
            self._described.move_to_end(stamp)
            return known
        layer = newest if newest is not None and newest.stamp == stamp else await entry.kept.get(stamp.version)
        known = self._described[layer.stamp] = HistoryEntry(
            version=layer.stamp.version,
            num_batches_tracked=layer.state.num_batches_tracked,
            samples_tracked=layer.state.samples_tracked,
            operation=layer.operation,
            at=layer.updated_at,
            digest=await self._executor.digest(layer),
        )
        while len(self._described) > _DESCRIBED:
            self._described.popitem(last=False)
        return known

    async def _documents(self, entry: CacheEntry, pins: Sequence[base.Pin]) -> Pins:
        """The pins with their digests, without those that are deleted meanwhile."""
        stamps = await self._kept(entry) if pins else {}
        found: list[Pin] = []
        for pin in pins:
            with suppress(VersionNotFound):
                if (stamp := stamps.get(pin.version)) is not None:
                    found.append(_document(pin, (await self._entry(entry, stamp)).digest))
        return Pins(pins=found)

    async def _kept(self, entry: CacheEntry) -> dict[int, Stamp]:
        name = entry.cached.name
        kept, _ = await entry.calls.retry(lambda: self._store.kept(name))
        if isinstance(kept, Missing):
            raise layer_not_found(name)
        return {stamp.version: stamp for stamp in kept}

    async def _pins(self, entry: CacheEntry) -> tuple[base.Pin, ...]:
        name = entry.cached.name
        found, _ = await entry.calls.retry(lambda: self._store.pins(name))
        if isinstance(found, Missing):
            raise layer_not_found(name)
        return found


def _pack(at: datetime, token: IdempotencyToken) -> bytes:
    """A pin's data in the store."""
    document = {"at": at.isoformat(), "key": token.key.hex(), "fingerprint": token.fingerprint.hex()}
    return json.dumps(document).encode()


def _document(pin: base.Pin, digest: str) -> Pin:
    data: dict[str, Any] = json.loads(pin.data)
    return Pin(tag=pin.tag, version=pin.version, digest=digest, at=datetime.fromisoformat(data["at"]))


def _check_same(name: str, pin: base.Pin, token: IdempotencyToken, version: int) -> None:
    """Check that the pin that has this tag already is the one that was asked for.

    Raises:
        IdempotencyKeyReused: another call with this key made it.
        PinExists: it is of another state than `version`.
    """
    data: dict[str, Any] = json.loads(pin.data)
    made_by = Receipt(bytes.fromhex(data["key"]), bytes.fromhex(data["fingerprint"]), pin.version, 0)
    if token.from_caller and made_by.key == token.key:
        refuse_reuse(token, made_by)
    elif pin.version != version:
        raise PinExists(
            f"the tag {pin.tag!r} of layer {name!r} stands for version {pin.version}; delete its pin first",
            field="tag",
            expected=pin.version,
            got=version,
        )
