"""A store in memory, for tests and for trying the service out. Its records are lost with the process."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from batchnorm_service.runtime import RUNTIME, Runtime
from batchnorm_service.store.base import (
    CONTENDER_SECONDS,
    HEAD_BYTES,
    Attachment,
    Committed,
    Conflict,
    Duplicates,
    Entry,
    Exists,
    Full,
    GroupStatus,
    Missing,
    NotKept,
    Pin,
    Pinned,
    Receipt,
    ReceiptWithTTL,
    Record,
    Shard,
    Stamp,
    StoreError,
    StoreOptions,
    StoreRefusedError,
    Unchanged,
)

_PURGE_STEP = 100


@dataclass(slots=True)
class _Group:
    size: int
    expires: float
    shards: dict[bytes, Shard] = field(default_factory=dict)


class MemoryStore:
    """Table of records in a dict.

    In tests, several services may share one object (`exclusive=False`): it is open until each has closed it. The
    records live as long as the object, so closing and opening it simulates a restart without data loss.

    Args:
        receipt_seconds: time to live of receipts.
        exclusive: whether there is only one user of this object.
        runtime: its wall clock determines when receipts expire.
    """

    def __init__(self, receipt_seconds: float = 3600.0, exclusive: bool = True, runtime: Runtime = RUNTIME) -> None:
        self.exclusive = exclusive
        self.url = "memory:"
        self._receipt_seconds = receipt_seconds
        self._runtime = runtime
        self._users = 0
        self._records: dict[str, Record] = {}
        self._names: list[str] = []  # sorted by code points, which is the order of the UTF-8 bytes
        self._contenders: dict[str, dict[bytes, float]] = {}  # time, by record name and first receipt key
        self._floor = 0  # the largest version of any deleted record
        self._groups: dict[tuple[int, bytes], _Group] = {}
        self._kept: dict[int, dict[int, Record]] = {}  # by incarnation and version
        self._pins: dict[int, dict[str, Pin]] = {}  # by incarnation and tag
        self._attachments: dict[int, dict[str, Attachment]] = {}  # by incarnation and key
        # By incarnation and key, of all layers, oldest first, so that purging needs no search. Receipts of a deleted
        # layer become unreachable with its incarnation, and are freed when they expire.
        self._receipts: OrderedDict[tuple[int, bytes], tuple[float, Receipt]] = OrderedDict()

    async def open(self) -> None:
        """Open the store; every `open` needs one `close`."""
        self._users += 1

    async def close(self) -> None:
        """Close the store; the records remain for the next `open`."""
        self._users = max(self._users - 1, 0)

    async def ping(self) -> None:
        """Raise `StoreError` unless the store is open."""
        if not self._users:
            raise StoreError("the memory store is not open")

    async def load(self, name: str, unless: Stamp | None = None) -> Record | Unchanged | Missing:
        """See `Store.load`."""
        await self.ping()
        record = self._records.get(name)
        if record is None:
            return Missing()
        return Unchanged() if record.stamp == unless else record

    async def create(self, name: str, data: bytes, limit: int) -> Record | Exists | Full:
        """See `Store.create`."""
        await self.ping()
        if (present := self._records.get(name)) is not None:
            return Exists(present)
        if len(self._records) >= limit:
            return Full()
        record = Record(Stamp(self._runtime.bits(63), self._floor + 1, self._runtime.bits(63)), data)
        self._records[name] = record
        insort(self._names, name)
        return record

    async def commit(
        self, name: str, expected: Stamp, record: Record | None, receipts: Sequence[Receipt], keep: int = 0
    ) -> Committed | Conflict | Missing | Duplicates:
        """See `Store.commit`."""
        await self.ping()
        present = self._records.get(name)
        if present is None:
            return Missing()
        now = self._runtime.wall()
        incarnation = present.stamp.incarnation
        if duplicates := self._unexpired(incarnation, [receipt.key for receipt in receipts], now):
            return Duplicates(duplicates)
        if present.stamp != expected:
            if incarnation != expected.incarnation:
                return Conflict()
            if receipts:
                self._contenders.setdefault(name, {}).setdefault(receipts[0].key, now)
            return Conflict(present)
        if record is not None:
            self._records[name] = record
            if keep > 0:
                self._keep(present)
                self._trim(incarnation, keep)
        lost, own = self._contenders.pop(name, {}), {receipt.key for receipt in receipts}
        if contenders := {key: at for key, at in lost.items() if key not in own and at + CONTENDER_SECONDS > now}:
            self._contenders[name] = contenders
        for receipt in receipts:
            self._receipts.pop((incarnation, receipt.key), None)  # expired: insert the new one at the end
            self._receipts[incarnation, receipt.key] = (now + self._receipt_seconds, receipt)
        self._purge(now, _PURGE_STEP + len(receipts))
        return Committed(len(contenders))

    async def find_receipts(self, name: str, incarnation: int, keys: Sequence[bytes]) -> tuple[Receipt, ...] | Missing:
        """See `Store.find_receipts`."""
        await self.ping()
        present = self._records.get(name)
        if present is None or present.stamp.incarnation != incarnation:
            return Missing()
        return self._unexpired(incarnation, keys, self._runtime.wall())

    async def delete(
        self, name: str, expected: Stamp, *, with_pins: bool = False
    ) -> Committed | Conflict | Missing | Pinned:
        """See `Store.delete`."""
        await self.ping()
        present = self._records.get(name)
        if present is None:
            return Missing()
        if present.stamp != expected:
            return Conflict()
        if self._pins.get(expected.incarnation) and not with_pins:
            return Pinned()
        del self._records[name]
        self._kept.pop(expected.incarnation, None)
        self._pins.pop(expected.incarnation, None)
        self._attachments.pop(expected.incarnation, None)
        self._contenders.pop(name, None)
        del self._names[bisect_left(self._names, name)]
        self._floor = max(self._floor, expected.version)
        return Committed()

    async def kept(self, name: str) -> tuple[Stamp, ...] | Missing:
        """See `Store.kept`."""
        await self.ping()
        if (present := self._records.get(name)) is None:
            return Missing()
        kept = self._kept.get(present.stamp.incarnation, {})
        return tuple(kept[version].stamp for version in sorted(kept, reverse=True))

    async def load_kept(
        self, name: str, at: int | str, unless: Stamp | None = None
    ) -> Record | Unchanged | NotKept | Missing:
        """See `Store.load_kept`."""
        await self.ping()
        if (present := self._records.get(name)) is None:
            return Missing()
        incarnation = present.stamp.incarnation
        pin = None if isinstance(at, int) else self._pins.get(incarnation, {}).get(at)
        record = self._find(present, at if isinstance(at, int) else 0 if pin is None else pin.version)
        if record is None:
            return NotKept()
        return Unchanged() if record.stamp == unless else record

    async def pin(
        self, name: str, stamp: Stamp | None, tag: str, data: bytes, limit: int
    ) -> Committed | Pinned | Full | NotKept | Missing:
        """See `Store.pin`."""
        await self.ping()
        present = self._records.get(name)
        if present is None:
            return Missing()
        stamp = stamp or present.stamp
        if present.stamp.incarnation != stamp.incarnation:
            return Missing()
        pins = self._pins.get(stamp.incarnation, {})
        if tag in pins:
            return Pinned(pins[tag])
        record = self._find(present, stamp.version)
        if record is None or record.stamp != stamp:
            return NotKept()
        if len(pins) >= limit:
            return Full()
        self._keep(record)
        self._pins.setdefault(stamp.incarnation, {})[tag] = Pin(tag, stamp.version, data)
        return Committed(pinned=record)

    async def pins(self, name: str) -> tuple[Pin, ...] | Missing:
        """See `Store.pins`."""
        await self.ping()
        if (present := self._records.get(name)) is None:
            return Missing()
        pins = self._pins.get(present.stamp.incarnation, {})
        return tuple(pins[tag] for tag in sorted(pins))

    async def unpin(self, name: str, incarnation: int, tag: str, keep: int) -> Committed | NotKept | Missing:
        """See `Store.unpin`."""
        await self.ping()
        present = self._records.get(name)
        if present is None or present.stamp.incarnation != incarnation:
            return Missing()
        if self._pins.get(incarnation, {}).pop(tag, None) is None:
            return NotKept()
        self._trim(incarnation, keep)
        return Committed()

    async def import_history(
        self, name: str, incarnation: int, kept: Sequence[Record], pins: Sequence[Pin]
    ) -> Committed | Missing:
        """See `Store.import_history`."""
        await self.ping()
        present = self._records.get(name)
        if present is None or present.stamp.incarnation != incarnation:
            return Missing()
        for record in kept:
            self._keep(replace(record, stamp=record.stamp._replace(incarnation=incarnation)))
        for pin in pins:
            if pin.version == present.stamp.version:
                self._keep(present)
            self._pins.setdefault(incarnation, {})[pin.tag] = pin
        return Committed()

    async def join(self, name: str, incarnation: int, group: bytes, size: int, shard: Shard) -> GroupStatus | Missing:
        """See `Store.join`."""
        await self.ping()
        present = self._records.get(name)
        if present is None or present.stamp.incarnation != incarnation:
            return Missing()
        now = self._runtime.wall()
        for key in [key for key, group_ in self._groups.items() if group_.expires <= now]:
            del self._groups[key]
        found = self._groups.setdefault((incarnation, group), _Group(size, now + self._receipt_seconds))
        added = found.size == size and shard.member not in found.shards and len(found.shards) < size
        if added:
            found.shards[shard.member] = shard
        shards = [found.shards[member] for member in sorted(found.shards)]
        parts = tuple(each.part for each in shards) if len(shards) == found.size else ()
        return GroupStatus(found.size, {each.member: each.fingerprint for each in shards}, parts, added)

    async def leave(self, name: str, incarnation: int, group: bytes, member: bytes | None) -> None:
        """See `Store.leave`."""
        await self.ping()
        if (found := self._groups.get((incarnation, group))) is not None:
            if member is not None:
                found.shards.pop(member, None)
            if member is None or not found.shards:
                del self._groups[incarnation, group]

    async def attachment(self, name: str, incarnation: int, key: str) -> Attachment | Missing | None:
        """See `Store.attachment`."""
        await self.ping()
        present = self._records.get(name)
        if present is None or present.stamp.incarnation != incarnation:
            return Missing()
        return self._attachments.get(incarnation, {}).get(key)

    async def attach(
        self, name: str, incarnation: int, key: str, new: Attachment, expected: int | None
    ) -> Committed | Conflict | Missing:
        """See `Store.attach`."""
        await self.ping()
        present = self._records.get(name)
        if present is None or present.stamp.incarnation != incarnation:
            return Missing()
        attachments = self._attachments.setdefault(incarnation, {})
        found = attachments.get(key)
        if (None if found is None else found.commit_id) not in (expected, new.commit_id):
            return Conflict()
        attachments[key] = new
        return Committed()

    async def list(self, prefix: str, after: str, limit: int) -> list[Entry]:
        """See `Store.list`."""
        await self.ping()
        start = max(bisect_left(self._names, prefix), bisect_right(self._names, after))
        entries: list[Entry] = []
        for name in islice(self._names, start, start + max(limit, 0)):
            if not name.startswith(prefix):
                break
            record = self._records[name]
            entries.append(Entry(name, record.stamp, record.data[:HEAD_BYTES]))
        return entries

    async def receipts(self) -> AsyncIterator[Sequence[ReceiptWithTTL]]:
        """See `Store.receipts`."""
        await self.ping()
        now = self._runtime.wall()
        yield [
            ReceiptWithTTL(incarnation, receipt, expires - now)
            for (incarnation, _), (expires, receipt) in self._receipts.items()
            if expires > now
        ]

    async def import_receipts(
        self, name: str, incarnation: int, receipts: Sequence[ReceiptWithTTL]
    ) -> Committed | Missing:
        """See `Store.import_receipts`."""
        await self.ping()
        present = self._records.get(name)
        if present is None or present.stamp.incarnation != incarnation:
            return Missing()
        now = self._runtime.wall()
        for _, receipt, seconds in receipts:
            if not self._unexpired(incarnation, [receipt.key], now):
                # Not in order of expiry: receipts inserted after a longer-lived one are freed only after that.
                self._receipts.pop((incarnation, receipt.key), None)
                self._receipts[incarnation, receipt.key] = (now + seconds, receipt)
        return Committed()

    def _find(self, present: Record, version: int) -> Record | None:
        """The newest or kept record of a version."""
        if present.stamp.version == version:
            return present
        return self._kept.get(present.stamp.incarnation, {}).get(version)

    def _keep(self, record: Record) -> None:
        self._kept.setdefault(record.stamp.incarnation, {})[record.stamp.version] = record

    def _trim(self, incarnation: int, keep: int) -> None:
        """Remove kept records without a pin, except the `keep` newest."""
        kept = self._kept.get(incarnation, {})
        pinned = {pin.version for pin in self._pins.get(incarnation, {}).values()}
        free = sorted(kept.keys() - pinned, reverse=True)
        for version in free[keep:]:
            del kept[version]

    def _unexpired(self, incarnation: int, keys: Sequence[bytes], now: float) -> tuple[Receipt, ...]:
        found = (self._receipts.get((incarnation, key)) for key in dict.fromkeys(keys))
        return tuple(each[1] for each in found if each is not None and each[0] > now)

    def _purge(self, now: float, limit: int) -> None:
        for _ in range(limit):
            if not self._receipts or next(iter(self._receipts.values()))[0] > now:
                return
            self._receipts.popitem(last=False)


def from_url(url: str, options: StoreOptions) -> MemoryStore:
    """The store of `memory:`. Raises `StoreRefusedError`."""
    options.without_replicas()
    if not options.exclusive:
        raise StoreRefusedError("memory: lives in one process; several workers need sqlite: or valkey:")
    if url.partition(":")[2]:
        raise StoreRefusedError("a memory store has no name or options: its URL is memory:")
    return MemoryStore(options.receipt_seconds)
