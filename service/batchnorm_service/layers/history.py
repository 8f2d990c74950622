"""A layer's history: lists kept states, and pins some under tags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from batchnorm_client.wire.documents import HistoryEntry, HistoryPage, Pin, Pins
from batchnorm_client.wire.errors import PinExists, TooManyPins, VersionNotFound

from ..runtime import Runtime
from ..store import base
from ..store.base import Full, Missing, NotKept, Pinned, Receipt, Store
from .cache import CacheEntry, LayerCache
from .cached_state import layer_not_found
from .compute import ComputeExecutor
from .idempotency import IdempotencyToken, make_token
from .kept_states import version_not_found
from .records import CommittedLayer, now
from .results import LayersOptions
from .updates import refuse_reuse


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

    async def names(self, name: str) -> tuple[Sequence[int], Sequence[str]]:
        """The versions of the newest and of the kept states, newest first, and the tags of the pins."""
        with self._cache.use(name) as entry:
            versions = await self._versions(entry, await entry.cached.fresh())
            return versions, [pin.tag for pin in await self._pins(entry)]

    async def list(self, name: str, limit: int, before: int | None) -> HistoryPage:
        """The newest state and those that are kept: up to `limit` with versions below `before`, newest first."""
        with self._cache.use(name) as entry:
            newest = await entry.cached.fresh()
            versions = await self._versions(entry, newest)
            if before is not None:
                versions = [version for version in versions if version < before]
            found: list[HistoryEntry] = []
            for version in versions[:limit]:
                try:
                    layer = newest if version == newest.stamp.version else await entry.kept.get(version)
                except VersionNotFound:
                    continue  # no longer kept since the versions were listed
                found.append(await self._entry(layer))
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
            outcome, _ = await entry.calls.retry(lambda: self._store.pin(name, stamp, tag, data, limit))
            match outcome:
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
                case Pinned(found) if found is not None and found.data != data:
                    newest = version or (await entry.cached.fresh()).stamp.version
                    _check_same(name, found, token, newest)
                    return await self._document(entry, found), False
                case _:  # done; or found done, after its reply was lost
                    layer = await entry.kept.get(tag)
                    return await self._document(entry, base.Pin(tag, layer.stamp.version, data)), True

    async def pins(self, name: str) -> Pins:
        """All pins, by tag."""
        with self._cache.use(name) as entry:
            found: list[Pin] = []
            for pin in await self._pins(entry):
                with suppress(VersionNotFound):  # deleted since the pins were listed
                    found.append(await self._document(entry, pin))
            return Pins(pins=found)

    async def get_pin(self, name: str, tag: str) -> Pin:
        """The pin of a tag. Raises `VersionNotFound` if there is none."""
        with self._cache.use(name) as entry:
            for pin in await self._pins(entry):
                if pin.tag == tag:
                    return await self._document(entry, pin)
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

    async def _entry(self, layer: CommittedLayer) -> HistoryEntry:
        return HistoryEntry(
            version=layer.stamp.version,
            num_batches_tracked=layer.state.num_batches_tracked,
            samples_tracked=layer.state.samples_tracked,
            operation=layer.operation,
            at=layer.updated_at,
            digest=await self._executor.digest(layer),
        )

    async def _document(self, entry: CacheEntry, pin: base.Pin) -> Pin:
        data: dict[str, Any] = json.loads(pin.data)
        digest = await self._executor.digest(await entry.kept.get(pin.tag))
        return Pin(tag=pin.tag, version=pin.version, digest=digest, at=datetime.fromisoformat(data["at"]))

    async def _versions(self, entry: CacheEntry, newest: CommittedLayer) -> Sequence[int]:
        name = entry.cached.name
        kept, _ = await entry.calls.retry(lambda: self._store.kept(name))
        if isinstance(kept, Missing):
            raise layer_not_found(name)
        return sorted({newest.stamp.version, *(stamp.version for stamp in kept)}, reverse=True)

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
