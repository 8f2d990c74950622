"""The store protocol: what every store does, in words that a conformance suite checks (`tests/store`).

A store is a table of records with compare-and-set. A record is bytes and a stamp. Stamps are compared for equality,
never by order: a name that was deleted and created again, or a failover that lost an unacknowledged commit, must
never look like the record someone holds.

A receipt says that a fold was applied. Receipts are written with the record in one transaction, or not at all; they
expire, and they go when their layer is deleted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

HEAD_BYTES: Final = 4096
"""How much of each record a listing carries: room for the header of a safetensors file and its counters."""

LOST_SECONDS: Final = 1.0
"""How long a lost race is remembered: whoever lost it tries again much sooner, if at all."""


class Stamp(NamedTuple):
    """What tells one state of a record from every other.

    Attributes:
        incarnation: random 63-bit number, new at every create.
        version: grows with every commit; never repeats for a name, also after delete and create.
        commit_id: random 63-bit number, new at every commit.
    """

    incarnation: int
    version: int
    commit_id: int

    def next(self, commit_id: int) -> Stamp:
        """The stamp of the commit that follows this one, with random bits of its own."""
        return Stamp(self.incarnation, self.version + 1, commit_id)


@dataclass(frozen=True, slots=True)
class Record:
    """A layer as the store sees it."""

    stamp: Stamp
    data: bytes


class Receipt(NamedTuple):
    """A fold that was applied.

    Attributes:
        key: 16 bytes, the digest of the caller's Idempotency-Key, or the time and random bits.
        fingerprint: 16 bytes, what the key stands for: a repeat with another fingerprint is another batch.
        version: of the commit that folded it.
        batch: the layer's `num_batches_tracked` after this fold.
        payload: what else a repeat needs to be told; empty but for the folds of a group.
    """

    key: bytes
    fingerprint: bytes
    version: int
    batch: int
    payload: bytes = b""


class ReceiptWithTTL(NamedTuple):
    """A receipt, whose it is, and how long it still counts.

    Attributes:
        incarnation: of the layer.
        receipt: as it was written.
        seconds: until it expires.
    """

    incarnation: int
    receipt: Receipt
    seconds: float


@dataclass(frozen=True, slots=True)
class Committed:
    """The record and the receipts are written, durably.

    Attributes:
        contenders: how many other commits of this record wait: they met a newer record than they expected not longer
            ago than `LOST_SECONDS`, and have not won since. A commit is identified by its first receipt's key; one
            without receipts is not counted. None when the store does not know, and after anything else than a commit.
    """

    contenders: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Conflict:
    """The record has another stamp than expected. Nothing was written.

    Attributes:
        record: what a commit found instead, so that whoever lost a race need not load it; None after anything else
            than a commit, and for another incarnation than expected.
    """

    record: Record | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no record of this name. Nothing was written."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Some keys have unexpired receipts already: these. Nothing was written, but a store may have renewed them."""

    receipts: tuple[Receipt, ...]


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The record still has the stamp that the caller holds."""


@dataclass(frozen=True, slots=True)
class Exists:
    """A record of this name is there already. Nothing was written."""

    record: Record


@dataclass(frozen=True, slots=True)
class Full:
    """The store holds as many records as the limit allows. Nothing was written."""


class Shard(NamedTuple):
    """One member's part of a group that has not closed yet.

    Attributes:
        member: 16 bytes, who brings it.
        fingerprint: 16 bytes, what the part stands for.
        part: what the other members need to know of it.
    """

    member: bytes
    fingerprint: bytes
    part: bytes


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """Who has come to a group so far.

    Attributes:
        size: how many members it was opened for.
        members: those that came, with the fingerprints of their parts.
        parts: all parts, in the order of the members' keys, once the group is complete; empty until then.
        added: whether this call made its caller a member, also when the store had to send it twice.
    """

    size: int
    members: Mapping[bytes, bytes]
    parts: tuple[bytes, ...]
    added: bool = field(default=False, compare=False)


class Entry(NamedTuple):
    """A record as a listing shows it; `head` is the first `HEAD_BYTES` bytes of its data, or all of them."""

    name: str
    stamp: Stamp
    head: bytes


class StoreError(Exception):
    """The store did not do what it was asked to; whether it took effect may be unknown."""


class StoreLostError(StoreError):
    """The store is not the one that was opened any more: no call has an effect that lasts until it is opened again."""


class StoreRefusedError(Exception):
    """A store cannot be opened, with the reason in words: a newer file, a file in use, a URL that means nothing."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What the makers of stores are told; each takes what it has a use for.

    Attributes:
        receipt_seconds: how long a receipt counts.
        exclusive: no other process will open the store; a SQLite file is locked then, and a Valkey server never is.
        connections: to each Valkey server.
        timeout: seconds for a round trip to a Valkey server.
        wait_replicas: how many replicas must have a change before it is acknowledged.
        wait_timeout: seconds that a call waits for them.
    """

    receipt_seconds: float
    exclusive: bool = True
    connections: int = 2
    timeout: float = 5.0
    wait_replicas: int = 0
    wait_timeout: float = 1.0

    def without_replicas(self) -> StoreOptions:
        """The same, for a store that has no replicas. Raises `StoreRefusedError` when they are to be waited for."""
        if self.wait_replicas:
            raise StoreRefusedError("only Valkey and Redis have replicas to wait for")
        return self


class Store(Protocol):
    """A table of records with compare-and-set.

    Every method may raise `StoreError`: the outcome is then unknown, and the caller finds out by `load` (a create) or
    by repeating the commit with the same receipts (they come back as `Duplicates` if the first try took effect).
    A method that is cancelled has an unknown outcome too. Calls on one name that are begun one after the other take
    effect in that order, so that a load tells what became of a create before it.

    Attributes:
        exclusive: nobody but this object can write to the store, so that what was read or written through it stays
            true until the next write through it. False from when the store is lost (`StoreLostError`).
        url: where the records live, as a person would write it.
    """

    exclusive: bool
    url: str

    async def open(self) -> None:
        """Get ready, also after a `close`. Raises `StoreRefusedError` with the reason in words."""
        ...

    async def close(self) -> None:
        """Finish what was begun, then let go of every resource. Afterwards every call raises `StoreError`."""
        ...

    async def ping(self) -> None:
        """Return when the store answers; raises `StoreError` when it does not."""
        ...

    async def load(self, name: str, unless: Stamp | None = None) -> Record | Unchanged | Missing:
        """The record, or `Unchanged` when its stamp equals `unless`, or `Missing`."""
        ...

    async def create(self, name: str, data: bytes, limit: int) -> Record | Exists | Full:
        """Write a new record under a new incarnation.

        Its version is larger than any that the name ever had. At most `limit` records are held (a store on many
        machines may pass it by a few).
        """
        ...

    async def commit(
        self, name: str, expected: Stamp, record: Record | None, receipts: Sequence[Receipt]
    ) -> Committed | Conflict | Missing | Duplicates:
        """Replace the record whose stamp is `expected` and add the receipts, together or not at all, durably.

        `record` None leaves the record as it is and adds the receipts only; otherwise its stamp follows `expected`,
        or in a migration one with a larger version yet.
        Which answer comes when more than one fits: Missing before Duplicates before Conflict. `Duplicates` holds every
        one of the given keys that has an unexpired receipt.
        """
        ...

    async def find_receipts(self, name: str, incarnation: int, keys: Sequence[bytes]) -> tuple[Receipt, ...] | Missing:
        """The unexpired receipts of these keys. Asks only; what it answers is as durable as an acknowledged commit.

        `Missing` when there is no record of that name and incarnation.
        """
        ...

    async def delete(self, name: str, expected: Stamp) -> Committed | Conflict | Missing:
        """Remove the record whose stamp is `expected`, and its receipts with it, durably."""
        ...

    async def join(self, name: str, incarnation: int, group: bytes, size: int, shard: Shard) -> GroupStatus | Missing:
        """Add a shard to a group of a layer, unless its member is there already or the group has no place for it.

        A group is opened by its first shard; one with another size is not added. Shards are forgotten when receipts
        are. `Missing` when there is no record of that name and incarnation. A repeat changes nothing, so it also asks
        who has come.
        """
        ...

    async def leave(self, name: str, incarnation: int, group: bytes, member: bytes | None) -> None:
        """Take a member's shard out of a group again; None takes all of them."""
        ...

    async def list(self, prefix: str, after: str, limit: int) -> list[Entry]:
        """Up to `limit` records whose names start with `prefix` and follow `after`, in the order of their bytes."""
        ...

    def receipts(self) -> AsyncIterator[Sequence[ReceiptWithTTL]]:
        """Every unexpired receipt of every layer, in no order, some at a time; one may come twice.

        Those that are written meanwhile may be among them or not, and so may those of deleted layers.
        """
        ...

    async def remember(self, name: str, incarnation: int, receipts: Sequence[ReceiptWithTTL]) -> Committed | Missing:
        """Add receipts that last as long as they say, durably; one whose key has an unexpired receipt is left out.

        `Missing` when there is no record of that name and incarnation.
        """
        ...
