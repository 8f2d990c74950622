"""The store protocol. The conformance suite in `tests/store` checks every implementation.

A store is a table of records with compare-and-set. A record is bytes and a stamp. Stamps are compared for equality,
never by order: a record that was deleted and created again, or one whose unacknowledged commit was lost in a failover,
must never be mistaken for a cached one.

A receipt is written for each applied fold, in the same transaction as the record. Receipts expire, and are deleted with
their layer.

A commit may keep the record that it replaces: kept records are a layer's history. Only the newest ones stay, and those
that a pin names, as long as it stands. They are deleted with their layer.

A record may have attachments: bytes under a key, with a compare-and-set of their own, which are no part of its state,
its version or its history. They are deleted with their layer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

HEAD_BYTES: Final = 4096
"""How many bytes of each record a listing returns: enough for the header of a safetensors file and its counters."""

CONTENDER_SECONDS: Final = 1.0
"""Seconds for which a commit that lost a race counts as a contender; it retries much sooner, if at all."""


class Stamp(NamedTuple):
    """Unique identifier of one state of a record.

    Attributes:
        incarnation: random 63-bit number, new at every create.
        version: grows with every commit; never repeats for a name, even after delete and create.
        commit_id: random 63-bit number, new at every commit.
    """

    incarnation: int
    version: int
    commit_id: int

    def next(self, commit_id: int) -> Stamp:
        """The stamp of the next commit, with a new random `commit_id`."""
        return Stamp(self.incarnation, self.version + 1, commit_id)

    @property
    def tag(self) -> str:
        """A text that no other state of this name has, also if a failover has used its version again."""
        return f"{self.version}-{self.commit_id:x}"


@dataclass(frozen=True, slots=True)
class Record:
    """A layer in the store: its stamp and its serialized state."""

    stamp: Stamp
    data: bytes


class Receipt(NamedTuple):
    """Proof that an update was applied, found by its key.

    Attributes:
        key: 16 bytes: the digest of the caller's Idempotency-Key, or the time and random bits.
        fingerprint: 16 bytes: the digest of the call; a retry has the same one.
        version: the version after the update's commit.
        batch: the layer's `num_batches_tracked` after the update.
        payload: the result of a group, for its members; otherwise empty.
    """

    key: bytes
    fingerprint: bytes
    version: int
    batch: int
    payload: bytes = b""


class ReceiptWithTTL(NamedTuple):
    """A receipt with its layer and its remaining time to live.

    Attributes:
        incarnation: of the layer.
        receipt: the receipt.
        seconds: until it expires.
    """

    incarnation: int
    receipt: Receipt
    seconds: float


@dataclass(frozen=True, slots=True)
class Committed:
    """The record and the receipts are written durably.

    Attributes:
        contenders: how many other commits of this record had a conflict within the last `CONTENDER_SECONDS` and have
            not succeeded since. A commit is identified by its first receipt key; one without receipts is not counted.
            None if the store does not count them, and after operations other than a commit.
        pinned: after a pin, the record that it keeps; None after other operations.
    """

    contenders: int | None = field(default=None, compare=False, repr=False)
    pinned: Record | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Conflict:
    """The record has another stamp than expected. Nothing was written.

    Attributes:
        record: the current record, so that the caller need not load it; None after operations other than a commit, and
            if the record has another incarnation.
    """

    record: Record | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no such record. Nothing was written."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Some keys already have these unexpired receipts. Nothing was written, but a store may renew the receipts."""

    receipts: tuple[Receipt, ...]


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The record still has the caller's stamp."""


@dataclass(frozen=True, slots=True)
class Exists:
    """A record of this name exists already. Nothing was written."""

    record: Record


@dataclass(frozen=True, slots=True)
class Full:
    """The limit on the number of records is reached. Nothing was written."""


class Pin(NamedTuple):
    """A name for a kept record, which stays as long as the pin.

    Attributes:
        tag: the name, unique within the layer.
        version: of the kept record.
        data: the caller's bytes.
    """

    tag: str
    version: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Pinned:
    """A pin stands in the way of the operation. Nothing was written.

    Attributes:
        pin: the pin of that tag; None if a record with pins was to be deleted.
    """

    pin: Pin | None = None


@dataclass(frozen=True, slots=True)
class NotKept:
    """There is a record of this name, but no kept one with this stamp, version or tag. Nothing was written."""


class Shard(NamedTuple):
    """One member's contribution to an open group.

    Attributes:
        member: 16 bytes: the member's key.
        fingerprint: 16 bytes: the digest of the member's call.
        part: the serialized statistics of the member's shard.
    """

    member: bytes
    fingerprint: bytes
    part: bytes


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """Current members of a group.

    Attributes:
        size: how many members it was opened for.
        members: the fingerprints of those that have joined, by key.
        parts: once the group is complete, all parts in the order of the members' keys; empty until then.
        added: whether this call added its member, also if the store had to repeat the call.
    """

    size: int
    members: Mapping[bytes, bytes]
    parts: tuple[bytes, ...]
    added: bool = field(default=False, compare=False)


class Attachment(NamedTuple):
    """Bytes beside a record.

    Attributes:
        commit_id: random 63-bit number, new each time they are replaced.
        data: the caller's bytes.
    """

    commit_id: int
    data: bytes


class Entry(NamedTuple):
    """A record in a listing; `head` is its first `HEAD_BYTES` bytes, or all of them."""

    name: str
    stamp: Stamp
    head: bytes


class StoreError(Exception):
    """An operation failed; its outcome may be unknown."""


class StoreLostError(StoreError):
    """The opened store was removed or replaced: nothing can be stored until it is opened again."""


class StoreRefusedError(Exception):
    """A store cannot be opened; the message says why, such as an invalid URL, a file in use or a newer schema."""


class StoreDamagedError(StoreRefusedError):
    """A store is damaged, and has to be restored from a backup."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Options for creating a store; each kind of store uses those that concern it.

    Attributes:
        receipt_seconds: time to live of receipts.
        exclusive: whether only this process uses the store; an SQLite file is then locked.
        connections: number of connections to each Valkey server.
        timeout: seconds for a round trip to a Valkey server.
        wait_replicas: how many replicas must have a write before it is acknowledged.
        wait_timeout: seconds to wait for them.
        check_bytes: an SQLite file up to this size is checked for damage when it is opened.
    """

    receipt_seconds: float
    exclusive: bool = True
    connections: int = 2
    timeout: float = 5.0
    wait_replicas: int = 0
    wait_timeout: float = 1.0
    check_bytes: int = 0

    def without_replicas(self) -> StoreOptions:
        """These options, for a store without replicas. Raises `StoreRefusedError` if `wait_replicas` is set."""
        if self.wait_replicas:
            raise StoreRefusedError("only Valkey and Redis have replicas to wait for")
        return self


class Store(Protocol):
    """A table of records with compare-and-set.

    Every method may raise `StoreError`. The outcome is then unknown; the caller can determine it by `load` (after a
    create), or by repeating the commit with the same receipts (`Duplicates` if the first attempt took effect). A
    cancelled call has an unknown outcome too. Calls on one name take effect in the order in which they were started, so
    a load shows the effect of an earlier create.

    Attributes:
        exclusive: whether only this object can write to the store, so that caches need no checks. Becomes False when
            the store is lost (`StoreLostError`).
        url: the store's URL, without passwords.
    """

    exclusive: bool
    url: str

    async def open(self) -> None:
        """Open the store, also again after `close`. Raises `StoreRefusedError`."""
        ...

    async def close(self) -> None:
        """Finish running calls, then release all resources. Afterwards every call raises `StoreError`."""
        ...

    async def ping(self) -> None:
        """Return if the store responds, otherwise raise `StoreError`."""
        ...

    async def load(self, name: str, unless: Stamp | None = None) -> Record | Unchanged | Missing:
        """Load the record; `Unchanged` if its stamp equals `unless`."""
        ...

    async def create(self, name: str, data: bytes, limit: int) -> Record | Exists | Full:
        """Write a new record under a new incarnation.

        Its version is larger than any that the name ever had. The store holds at most `limit` records (a distributed
        store may exceed it slightly).
        """
        ...

    async def commit(
        self, name: str, expected: Stamp, record: Record | None, receipts: Sequence[Receipt], keep: int = 0
    ) -> Committed | Conflict | Missing | Duplicates:
        """Atomically and durably replace the record whose stamp is `expected`, and add the receipts.

        With `record` None, only the receipts are added. Otherwise its stamp is `expected.next(...)`, or in a transfer
        between stores one with a larger version. If several outcomes apply, Missing precedes Duplicates, which precedes
        Conflict. `Duplicates` has the unexpired receipts of all given keys. With a positive `keep`, the replaced record
        is kept; of the kept records without a pin, the `keep` newest remain.
        """
        ...

    async def find_receipts(self, name: str, incarnation: int, keys: Sequence[bytes]) -> tuple[Receipt, ...] | Missing:
        """The unexpired receipts of these keys, as durable as an acknowledged commit; adds none.

        `Missing` if there is no record of that name and incarnation.
        """
        ...

    async def delete(
        self, name: str, expected: Stamp, *, with_pins: bool = False
    ) -> Committed | Conflict | Missing | Pinned:
        """Durably delete the record whose stamp is `expected`, its receipts and its kept records.

        `Pinned` if it has pins, unless `with_pins`; Conflict precedes it.
        """
        ...

    async def kept(self, name: str) -> tuple[Stamp, ...] | Missing:
        """The stamps of the kept records, by descending version. The newest is one of them if it is or was pinned."""
        ...

    async def load_kept(
        self, name: str, at: int | str, unless: Stamp | None = None
    ) -> Record | Unchanged | NotKept | Missing:
        """The kept record of a version (the newest record counts as kept) or of a tag; `Unchanged` as in `load`."""
        ...

    async def pin(
        self, name: str, stamp: Stamp | None, tag: str, data: bytes, limit: int
    ) -> Committed | Pinned | Full | NotKept | Missing:
        """Durably pin the newest record, which is then kept too, or a kept one: that with this stamp.

        With None, the newest, whatever its stamp is; `Committed.pinned` is the record. If several outcomes apply:
        `Missing` if there is no record of that name and incarnation, `Pinned` with the pin that has this tag already
        (which a repeat of a call returns), `NotKept`, `Full` if the record has `limit` pins.
        """
        ...

    async def pins(self, name: str) -> tuple[Pin, ...] | Missing:
        """All pins, by tag in order of UTF-8 bytes."""
        ...

    async def unpin(self, name: str, incarnation: int, tag: str, keep: int) -> Committed | NotKept | Missing:
        """Durably remove a pin; of the kept records without a pin, the `keep` newest remain.

        `Missing` if there is no record of that name and incarnation, `NotKept` if it has no such pin.
        """
        ...

    async def import_history(
        self, name: str, incarnation: int, kept: Sequence[Record], pins: Sequence[Pin]
    ) -> Committed | Missing:
        """Durably add kept records, under the record's own incarnation, and pins; those that exist are replaced.

        Each pin's version is that of a kept record or of the newest, which is then kept too. `Missing` if there is no
        record of that name and incarnation.
        """
        ...

    async def join(self, name: str, incarnation: int, group: bytes, size: int, shard: Shard) -> GroupStatus | Missing:
        """Add a shard to a group of a layer, unless its member has joined already or the group is full.

        The first shard opens the group; a shard with another size is not added. Shards expire like receipts. `Missing`
        if there is no record of that name and incarnation. Idempotent, so repeating it also reads the group's status.
        """
        ...

    async def leave(self, name: str, incarnation: int, group: bytes, member: bytes | None) -> None:
        """Remove a member's shard from a group; None removes all shards."""
        ...

    async def attachment(self, name: str, incarnation: int, key: str) -> Attachment | Missing | None:
        """What is attached under a key; None if nothing is. `Missing` if there is no record of that incarnation."""
        ...

    async def attach(
        self, name: str, incarnation: int, key: str, new: Attachment, expected: int | None
    ) -> Committed | Conflict | Missing:
        """Durably attach bytes in place of those whose commit id is `expected`; with None, there must not be any.

        Repeating a call that took effect is `Committed`, too, until another one has replaced its bytes. `Missing` if
        there is no record of that name and incarnation.
        """
        ...

    async def list(self, prefix: str, after: str, limit: int) -> list[Entry]:
        """Up to `limit` records whose names start with `prefix` and sort after `after`, in order of UTF-8 bytes."""
        ...

    def receipts(self) -> AsyncIterator[Sequence[ReceiptWithTTL]]:
        """All unexpired receipts of all layers, in pages, unordered, possibly with repetitions.

        Receipts written meanwhile, and those of deleted layers, may be included or not.
        """
        ...

    async def import_receipts(
        self, name: str, incarnation: int, receipts: Sequence[ReceiptWithTTL]
    ) -> Committed | Missing:
        """Durably add receipts with their time to live, except those whose key has an unexpired receipt.

        `Missing` if there is no record of that name and incarnation.
        """
        ...
