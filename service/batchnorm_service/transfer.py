"""Transfer of all layers, their history and receipts from one store to another: verified, and repeatable."""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from batchnorm_service.settings import Settings
from batchnorm_service.store.base import (
    Committed,
    Exists,
    Full,
    Missing,
    ReceiptWithTTL,
    Record,
    Stamp,
    Store,
    StoreRefusedError,
)
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.store.registry import store_from_url
from batchnorm_service.store.sqlite.store import SqliteStore
from batchnorm_service.store.valkey.address import SCHEMES

_PAGE: Final = 1000
_CONCURRENT_LAYERS: Final = 16  # two records of each are in memory
_NO_LIMIT: Final = 1 << 62

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with the current step, such as "layers", how many are done, and the total or None."""


class SameStoreError(Exception):
    """Source and target are the same store."""


@dataclass(slots=True)
class Report:
    """Result of a transfer.

    Attributes:
        copied: how many layers were written, and verified by reading them back.
        present: how many layers were in the target already, equal.
        kept: how many kept records are in the target.
        pins: how many pins are in the target.
        receipts: how many unexpired receipts are in the target.
        differing: layers that differ in the target; they, their history and their receipts were not copied.
        changed: layers that changed in the source or the target during the transfer.
    """

    copied: int = 0
    present: int = 0
    kept: int = 0
    pins: int = 0
    receipts: int = 0
    differing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the target has everything that the source has."""
        return not (self.differing or self.changed)


def store_to_move(url: str, settings: Settings, *, target: bool) -> Store:
    """Create the source or target store. Raises `StoreRefusedError` if the URL is invalid or the store unsuitable."""
    replicated = target and url.partition(":")[0].lower() in SCHEMES
    options = replace(settings.store_options(), exclusive=True)
    store = store_from_url(url, options if replicated else replace(options, wait_replicas=0))
    if isinstance(store, MemoryStore):
        raise StoreRefusedError("memory: lives in the process that uses it: nothing can be moved from it or to it")
    if isinstance(store, SqliteStore) and not target and not store.path.exists():
        raise StoreRefusedError(f"there is no file {store.path}")  # opening it would create one
    return store


async def migrate(
    source: Store, target: Store, progress: ProgressCallback, *, overwrite: bool = False, online: bool = False
) -> Report:
    """Copy all layers, their kept records, pins and unexpired receipts, and verify them by reading them back.

    Each layer gets a new incarnation. It keeps its version, unless the target has had that version or a larger one:
    then it gets a larger one. Kept records keep their versions. Other layers of the target remain. No service may write
    to the target meanwhile, nor to the source, unless `online`.

    Args:
        source: not open yet; unchanged, except that an SQLite file of an older release is upgraded.
        target: not open yet.
        progress: called with the progress.
        overwrite: replace layers that differ in the target, instead of skipping them.
        online: whether services may write to the source: each layer is copied as of one moment, with the receipts of
            that moment. `Report.changed` then has those that changed later.

    Raises:
        SameStoreError: both are the same store.
        StoreRefusedError: one of them cannot be opened.
        StoreError: one of them stopped responding. What was copied stays; repeat the call to continue.
    """
    if source.url == target.url:
        raise SameStoreError(f"{source.url} is both source and target")
    async with AsyncExitStack() as stack:
        for store in (source, target):
            await stack.enter_async_context(_opened(store))
        return await _Migration(source, target, progress, overwrite=overwrite, online=online).run()


@asynccontextmanager
async def _opened(store: Store) -> AsyncIterator[None]:
    await store.open()
    try:
        yield
    finally:
        await store.close()


class _Target(NamedTuple):
    """A copied layer: its name, its incarnation in the target, and its version in the source."""

    name: str
    incarnation: int
    version: int


class _Migration:
    def __init__(
        self, source: Store, target: Store, progress: ProgressCallback, *, overwrite: bool, online: bool
    ) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._overwrite = overwrite
        self._online = online
        self._report = Report()
        self._targets: dict[int, _Target] = {}  # by the source's incarnation

    async def run(self) -> Report:
        report = self._report
        names = await self._list(self._progress)
        self._progress("listing", len(names), len(names))
        await self._compare_incarnations(names)
        for start in range(0, len(names), _CONCURRENT_LAYERS):
            self._progress("layers", start, len(names))
            await asyncio.gather(*map(self._layer, list(names)[start : start + _CONCURRENT_LAYERS]))
        self._progress("layers", len(names), len(names))
        await self._receipts()
        now = await self._list(lambda *_: None)  # without progress, which is complete
        # Added to those found missing, or different when read back.
        changed = {name for name in names.keys() | now.keys() if names.get(name) != now.get(name)}
        report.changed = sorted(changed.union(report.changed))
        report.differing.sort()
        return report

    async def _list(self, progress: ProgressCallback) -> dict[str, Stamp]:
        stamps: dict[str, Stamp] = {}
        after = ""
        while page := await self._source.list("", after, _PAGE):
            stamps |= {entry.name: entry.stamp for entry in page}
            after = page[-1].name
            progress("listing", len(stamps), None)
        return stamps

    async def _compare_incarnations(self, names: dict[str, Stamp]) -> None:
        """Refuse one store under two URLs: equal incarnations, which are random, prove that it is the same."""
        for name, stamp in list(names.items())[:1]:
            found = await self._target.load(name)
            if isinstance(found, Record) and found.stamp.incarnation == stamp.incarnation:
                raise SameStoreError(f"{self._source.url} and {self._target.url} are one store, or a copy of its files")

    async def _layer(self, name: str) -> None:
        record, present = await asyncio.gather(self._source.load(name), self._target.load(name))
        if not isinstance(record, Record):  # deleted since it was listed
            self._report.changed.append(name)
            return
        if isinstance(present, Record) and present.data != record.data:
            if not self._overwrite:
                self._report.differing.append(name)
                return
            await self._target.delete(name, present.stamp, with_pins=True)  # its receipts and history go with it
            present = Missing()
        equal = isinstance(present, Record) and present.stamp.version >= record.stamp.version
        # Write even if it is present: an interrupted run may not have waited for the replicas; a create does.
        written = await self._write(name, record)
        if written is None or await self._target.load(name) != written:
            self._report.changed.append(name)
            return
        self._report.present += equal
        self._report.copied += not equal
        self._targets[record.stamp.incarnation] = _Target(name, written.stamp.incarnation, record.stamp.version)
        if not await self._history(name, record.stamp, written.stamp):
            self._report.changed.append(name)

    async def _history(self, name: str, source: Stamp, target: Stamp) -> bool:
        """Copy the kept records and pins that belong to the record with the stamp `source`; False if they changed."""
        # Pins first: with these, no kept record can be missing, unless its pin is deleted meanwhile.
        pins, stamps = await self._source.pins(name), await self._source.kept(name)
        if isinstance(pins, Missing) or isinstance(stamps, Missing):
            return False
        wanted = {stamp.version for stamp in stamps if stamp.version <= source.version}
        pins = tuple(pin for pin in pins if pin.version <= source.version)
        copied = {target.version}  # whose pins make the target keep it
        for version in wanted - copied:
            record = await self._source.load_kept(name, version)
            if isinstance(record, Record) and record.stamp.incarnation == source.incarnation:
                await self._target.import_history(name, target.incarnation, [record], [])
                found = await self._target.load_kept(name, version)
                if isinstance(found, Record) and found.data == record.data:
                    copied.add(version)
                    self._report.kept += 1
        await self._target.import_history(name, target.incarnation, [], [pin for pin in pins if pin.version in copied])
        told = await self._target.pins(name)
        there = set() if isinstance(told, Missing) else set(pins).intersection(told)
        self._report.pins += len(there)
        return copied >= wanted and len(there) == len(pins)

    async def _write(self, name: str, record: Record) -> Record | None:
        """Create the layer, then raise its version; repeatable after an interruption in between. None if it failed."""
        made = await self._target.create(name, record.data, _NO_LIMIT)
        if isinstance(made, Exists):
            made = made.record
        if isinstance(made, Full) or made.data != record.data:
            return None
        if made.stamp.version >= record.stamp.version:  # a layer of that name was deleted here
            return made
        stamp = Stamp(made.stamp.incarnation, record.stamp.version, secrets.randbits(63))
        raised = Record(stamp, record.data)
        done = await self._target.commit(name, made.stamp, raised, [])
        return raised if isinstance(done, Committed) else None

    async def _receipts(self) -> None:
        done = 0
        async for page in self._source.receipts():
            for incarnation, receipts in _by_incarnation(page).items():
                if incarnation in self._targets:  # otherwise the layer was deleted or not copied
                    await self._import_receipts(self._targets[incarnation], receipts)
                    done += len(receipts)
            self._progress("receipts", done, None)
        self._progress("receipts", done, done)

    async def _import_receipts(self, target: _Target, receipts: Sequence[ReceiptWithTTL]) -> None:
        name, incarnation, version = target
        if self._online:  # without those of updates that the copied record does not have
            receipts = [each for each in receipts if each.receipt.version <= version]
        began = asyncio.get_running_loop().time()
        await self._target.import_receipts(name, incarnation, receipts)
        told = await self._target.find_receipts(name, incarnation, [each.receipt.key for each in receipts])
        found = set() if isinstance(told, Missing) else set(told)
        passed = asyncio.get_running_loop().time() - began + 1
        if any(each.receipt not in found and each.seconds > passed for each in receipts):
            self._report.changed.append(name)
        self._report.receipts += len(found)


def _by_incarnation(page: Iterable[ReceiptWithTTL]) -> dict[int, list[ReceiptWithTTL]]:
    found: defaultdict[int, list[ReceiptWithTTL]] = defaultdict(list)
    for each in page:
        found[each.incarnation].append(each)
    return found
