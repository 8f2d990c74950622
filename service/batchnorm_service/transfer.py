"""Moving all layers and receipts from one store to another, so that it can be stopped, repeated, and trusted."""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

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
_AT_ONCE: Final = 16  # records in memory, each twice
_NO_LIMIT: Final = 1 << 62

Progress = Callable[[str, int, int | None], None]
"""Is told what is done now (listing, layers, receipts), how much of it is done, and of how much (None: nobody knows
before its end)."""


class SameStoreError(Exception):
    """There is nothing to move, or nowhere to move it to."""


@dataclass(slots=True)
class Report:
    """What became of a migration.

    Attributes:
        copied: how many layers were written, and read back.
        present: how many were there already, equal.
        receipts: how many unexpired receipts are in the target.
        differing: layers that the target has otherwise; they were left alone, and so were their receipts.
        changed: layers that somebody changed in the source, or in the target, while they were copied.
    """

    copied: int = 0
    present: int = 0
    receipts: int = 0
    differing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the target has all that the source has."""
        return not (self.differing or self.changed)


def store_to_move(url: str, settings: Settings, *, target: bool) -> Store:
    """The store of one end. Raises `StoreRefusedError`: it cannot be one, with the reason in words."""
    replicated = target and url.partition(":")[0].lower() in SCHEMES
    options = replace(settings.store_options(), exclusive=True)
    store = store_from_url(url, options if replicated else replace(options, wait_replicas=0))
    if isinstance(store, MemoryStore):
        raise StoreRefusedError("memory: lives in the process that uses it: nothing can be moved from it or to it")
    if isinstance(store, SqliteStore) and not target and not store.path.exists():
        raise StoreRefusedError(f"there is no file {store.path}")  # opening it would make one
    return store


async def migrate(source: Store, target: Store, progress: Progress, *, overwrite: bool = False) -> Report:
    """Copy every layer and every unexpired receipt, and read back what was written.

    A layer gets a new incarnation and keeps its version, or gets a larger one where the target has seen that already.
    What the target has and the source has not stays. No service may write to either store meanwhile.

    Args:
        source: not open yet; nothing in it is changed, but that an SQLite file of an older release is upgraded.
        target: not open yet.
        progress: is told how far it is.
        overwrite: replace layers that the target has otherwise, instead of leaving them alone.

    Raises:
        SameStoreError: both are one store.
        StoreRefusedError: one of them cannot be opened.
        StoreError: one of them stopped to answer. What was copied is there: the same call again goes on.
    """
    if source.url == target.url:
        raise SameStoreError(f"{source.url} is both source and target")
    async with AsyncExitStack() as stack:
        for store in (source, target):
            await stack.enter_async_context(_opened(store))
        return await _Migration(source, target, progress, overwrite=overwrite).run()


@asynccontextmanager
async def _opened(store: Store) -> AsyncIterator[None]:
    await store.open()
    try:
        yield
    finally:
        await store.close()


class _Migration:
    def __init__(self, source: Store, target: Store, progress: Progress, *, overwrite: bool) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._overwrite = overwrite
        self._report = Report()
        self._targets: dict[int, tuple[str, int]] = {}  # by the source's incarnation: the name and the target's

    async def run(self) -> Report:
        report = self._report
        names = await self._list(self._progress)
        self._progress("listing", len(names), len(names))
        await self._compare_incarnations(names)
        for start in range(0, len(names), _AT_ONCE):
            self._progress("layers", start, len(names))
            await asyncio.gather(*map(self._layer, list(names)[start : start + _AT_ONCE]))
        self._progress("layers", len(names), len(names))
        await self._receipts()
        now = await self._list(lambda *_: None)  # or a bar that is full would begin anew
        # A layer may have been noted already because it was gone, or read back wrong.
        changed = {name for name in names.keys() | now.keys() if names.get(name) != now.get(name)}
        report.changed = sorted(changed.union(report.changed))
        report.differing.sort()
        return report

    async def _list(self, progress: Progress) -> dict[str, Stamp]:
        stamps: dict[str, Stamp] = {}
        after = ""
        while page := await self._source.list("", after, _PAGE):
            stamps |= {entry.name: entry.stamp for entry in page}
            after = page[-1].name
            progress("listing", len(stamps), None)
        return stamps

    async def _compare_incarnations(self, names: dict[str, Stamp]) -> None:
        """Refuse a store under two URLs: no other store can have the same random number."""
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
            await self._target.delete(name, present.stamp)  # its receipts go with it
            present = Missing()
        there = isinstance(present, Record) and present.stamp.version >= record.stamp.version
        # What is there may be there since a run that did not live to see it on the replicas: a create waits for them.
        written = await self._write(name, record)
        if written is None or await self._target.load(name) != written:
            self._report.changed.append(name)
            return
        self._report.present += there
        self._report.copied += not there
        self._targets[record.stamp.incarnation] = (name, written.stamp.incarnation)

    async def _write(self, name: str, record: Record) -> Record | None:
        """Make the layer, then raise its version: a run that was stopped in between is taken up by the next."""
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
                if incarnation in self._targets:  # else they are of a deleted layer, or of one that was left alone
                    await self._remember(*self._targets[incarnation], receipts)
                    done += len(receipts)
            self._progress("receipts", done, None)
        self._progress("receipts", done, done)

    async def _remember(self, name: str, incarnation: int, receipts: Sequence[ReceiptWithTTL]) -> None:
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
