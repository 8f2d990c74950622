"""Records in Valkey or Redis 7: one server, one with replicas, or a Cluster. See docs/durability.md."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from batchnorm_service.runtime import RUNTIME, Runtime
from batchnorm_service.store.base import (
    Committed,
    Conflict,
    Duplicates,
    Entry,
    Exists,
    Full,
    GroupStatus,
    Missing,
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
from batchnorm_service.store.valkey.address import Node, parse_address
from batchnorm_service.store.valkey.commands import CommandRunner
from batchnorm_service.store.valkey.connection import Connector
from batchnorm_service.store.valkey.keys import (
    SCHEMA_VERSION,
    Keys,
    bucket_of,
    pack_number,
    pack_receipt,
    pack_stamp,
    unpack_number,
    unpack_receipt,
    unpack_record,
)
from batchnorm_service.store.valkey.names import LayerCounter, Names
from batchnorm_service.store.valkey.pipeline import Limits, Pipeline
from batchnorm_service.store.valkey.receipts import remember, scan
from batchnorm_service.store.valkey.scripts import (
    COMMIT,
    COUNT,
    CREATE,
    DELETE,
    FIND,
    FIND_AND_WAIT,
    HEAD,
    JOIN,
    LEAVE,
    LOAD,
    SCHEMA,
    Answer,
)
from batchnorm_service.store.valkey.topology import ClusterTopology

_REBIRTHS = 10  # how often a layer may be deleted and created again while one commit is on its way


@dataclass(frozen=True, slots=True)
class _Opened:
    """What there is between `open` and `close`."""

    topology: ClusterTopology
    calls: CommandRunner
    counter: LayerCounter


class ValkeyStore:
    """A table of records in Valkey.

    Every call is one script and one round trip, which it shares with the calls that wait at the same moment. What an
    answer promises depends on the server's settings and on `wait_replicas`. With it, a WAIT follows every create,
    commit and delete on its connection, and the answer is held back until that many replicas have the change.
    `StoreError` then means that it may be written; the same call again settles it, and is no way around the replicas:
    where it finds what it would write, it writes before it WAITs (a commit renews the receipts that it finds). Reads
    go to primaries and do not wait: they may see what is not acknowledged yet.

    Args:
        url: see `valkey_address`. `valkey://user:password@host:port/0`, `valkeys://`, `valkey+cluster://host,host`.
        receipt_seconds: how long a receipt counts, by the clock of the server.
        connections: how many connections each server gets from this process.
        timeout: seconds for a round trip, for connecting, and for a slot that is on its way to another server.
        wait_replicas: how many replicas must have a change before it is acknowledged. Only all the replicas that a
            primary has are enough for a failover to lose nothing.
        wait_timeout: seconds that a call waits for them.
        runtime: clock, chance, tasks.

    Raises:
        StoreRefusedError: the URL or a number means nothing, with the reason in words.
    """

    exclusive = False

    def __init__(
        self,
        url: str,
        receipt_seconds: float = 3600.0,
        *,
        connections: int = 2,
        timeout: float = 5.0,
        wait_replicas: int = 0,
        wait_timeout: float = 1.0,
        runtime: Runtime = RUNTIME,
    ) -> None:
        if connections < 1 or wait_replicas < 0 or not (timeout > 0 and wait_timeout > 0 and receipt_seconds > 0):
            raise StoreRefusedError(
                "a store needs connections and times above zero, and no negative number of replicas"
            )
        address = parse_address(url)
        self.url = address.url
        self._connector = Connector(address, timeout, runtime)
        self._runtime = runtime
        self._keys = Keys(address.prefix)
        self._receipt_milliseconds = math.ceil(1000 * receipt_seconds)
        self._connections = connections
        self._limits = Limits(timeout, wait_replicas, wait_timeout)
        self._waits = int(wait_replicas > 0)  # as the scripts are told
        self._opened: _Opened | None = None

    async def open(self) -> None:
        """Connect, and see that every server can be used. Raises `StoreRefusedError` with the reason in words."""
        if self._opened is not None:
            raise StoreError(f"{self.url} is open already")
        topology = ClusterTopology(self._connector, self._pipeline, self._connections, split=self._limits.replicas > 0)
        calls = CommandRunner(topology, self._limits.timeout, self._runtime)
        counter = LayerCounter(calls, self._keys, self._runtime)
        self._opened = _Opened(topology, calls, counter)
        try:
            await topology.open()
            schema = await calls.run(SCHEMA, 0, [self._keys.schema()], [SCHEMA_VERSION])
            if schema != b"%d" % SCHEMA_VERSION:
                raise StoreRefusedError(
                    f"it has schema version {schema.decode(errors='replace')[:20]}, and this release knows"
                    f" {SCHEMA_VERSION}: start the release that wrote it, or a later one, or give this one another"
                    " prefix"
                )
            await counter.refresh()
        except BaseException as error:
            self._opened = None
            await topology.close()
            if isinstance(error, StoreError | StoreRefusedError):
                raise StoreRefusedError(f"{self.url} cannot be used: {error}") from error
            raise

    async def close(self) -> None:
        """Finish what was begun, then disconnect."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            await opened.calls.finish()
            await opened.topology.close()

    async def ping(self) -> None:
        """Return when a server answers: as long as one does, its layers can be used.

        Raises:
            StoreError: none does.
        """
        opened = self._use()
        calls = [opened.calls.run(COUNT, bucket, [self._keys.names(bucket)]) for bucket in opened.topology.sample()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(failures) == len(answers):
            raise failures[0]

    async def load(self, name: str, unless: Stamp | None = None) -> Record | Unchanged | Missing:
        """See `Store.load`."""
        known = pack_stamp(unless) if unless else b""
        reply = await self._use().calls.run(LOAD, bucket_of(name), [self._keys.record(name)], [known])
        if isinstance(reply, bytes):
            return unpack_record(reply)
        return Missing() if reply == Answer.MISSING else Unchanged()

    async def create(self, name: str, data: bytes, limit: int) -> Record | Exists | Full:
        """See `Store.create`. Processes that create at the same time may pass the limit by what they do in a second."""
        opened = self._use()
        incarnation, commit_id = self._runtime.bits(63), self._runtime.bits(63)
        create = partial(self._create, opened, name, (pack_number(incarnation), pack_number(commit_id), data))
        reply = await create(limit)
        if reply[0] == Answer.FULL:  # unless others have deleted some since they were counted
            await opened.counter.refresh()
            reply = await create(limit)
        if reply[0] == Answer.FULL:
            return Full()
        if reply[0] == Answer.EXISTS:
            return Exists(unpack_record(reply[1]))
        await opened.counter.refresh_if_old()
        return Record(Stamp(incarnation, unpack_number(reply[1]), commit_id), data)

    async def commit(
        self, name: str, expected: Stamp, record: Record | None, receipts: Sequence[Receipt]
    ) -> Committed | Conflict | Missing | Duplicates:
        """See `Store.commit`."""
        calls = self._use().calls
        by_key = {receipt.key: receipt for receipt in receipts}
        data = b"" if record is None else pack_stamp(record.stamp) + record.data
        values = [pack_receipt(receipt) for receipt in by_key.values()]
        incarnation = expected.incarnation
        for _ in range(_REBIRTHS):
            own = (self._keys.receipt(name, incarnation, key) for key in by_key)
            keys = [self._keys.record(name), self._keys.losers(name), *own]
            args: list[bytes | int] = [pack_stamp(expected), pack_number(incarnation), self._receipt_milliseconds]
            reply = await calls.run(COMMIT, bucket_of(name), keys, [*args, self._waits, data, *values])
            if reply[0] != Answer.OTHER:
                return _outcome(reply, list(by_key))
            incarnation = unpack_number(reply[1])  # of a layer that the caller does not know: it has receipts too
        raise StoreError("the layer is deleted and created again and again")

    async def find_receipts(self, name: str, incarnation: int, keys: Sequence[bytes]) -> tuple[Receipt, ...] | Missing:
        """See `Store.find_receipts`. One round trip; another for what is found where replicas are to be waited for."""
        calls, own = self._use().calls, list(dict.fromkeys(keys))
        names = [self._keys.record(name), *(self._keys.receipt(name, incarnation, key) for key in own)]
        reply = await calls.run(FIND, bucket_of(name), names, [pack_number(incarnation), 0])
        if self._waits and len(reply) > 1:
            reply = await calls.run(FIND_AND_WAIT, bucket_of(name), names, [pack_number(incarnation), 1])
        return Missing() if reply[0] == Answer.MISSING else _receipts(reply, own)

    async def delete(self, name: str, expected: Stamp) -> Committed | Conflict | Missing:
        """See `Store.delete`."""
        opened = self._use()
        args: list[bytes | int] = [pack_stamp(expected), name.encode(), self._waits]
        outcome = _outcome(await opened.calls.run(DELETE, bucket_of(name), self._bucket_keys(name), args), [])
        if isinstance(outcome, Committed):
            opened.counter.deleted()
        assert not isinstance(outcome, Duplicates)  # noqa: S101 - there were no receipts
        return outcome

    async def join(self, name: str, incarnation: int, group: bytes, size: int, shard: Shard) -> GroupStatus | Missing:
        """See `Store.join`."""
        keys = [self._keys.record(name), *self._keys.group(name, incarnation, group)]
        args: Sequence[bytes | int] = (pack_number(incarnation), shard.member, size, shard.fingerprint, shard.part)
        call = self._runtime.bytes(8)
        reply = await self._use().calls.run(JOIN, bucket_of(name), keys, (*args, self._receipt_milliseconds, call))
        if reply[0] == Answer.MISSING:
            return Missing()
        _, added, fields, parts = reply
        members = dict(sorted(zip(fields[::2], fields[1::2], strict=True)))
        size = int(members.pop(b"size"))
        by_member = sorted(zip(parts[::2], parts[1::2], strict=True))
        return GroupStatus(size, members, tuple(part for _, part in by_member), bool(added))

    async def leave(self, name: str, incarnation: int, group: bytes, member: bytes | None) -> None:
        """See `Store.leave`."""
        keys = self._keys.group(name, incarnation, group)
        await self._use().calls.run(LEAVE, bucket_of(name), keys, [member or b""])

    async def list(self, prefix: str, after: str, limit: int) -> list[Entry]:
        """See `Store.list`. What changes meanwhile may be in it or not."""
        calls = self._use().calls
        entries: list[Entry] = []
        if limit <= 0:
            return entries
        names = Names(calls, self._keys, prefix, after, limit)
        while (missing := limit - len(entries)) > 0 and (page := await names.take(missing)):
            heads = (calls.run(HEAD, bucket_of(name), [self._keys.record(name)]) for name in page)
            for name, head in zip(page, await asyncio.gather(*heads), strict=True):
                if head:  # not deleted since its name was read
                    entry = unpack_record(head)
                    entries.append(Entry(name, entry.stamp, entry.data))
        return entries

    def receipts(self) -> AsyncIterator[Sequence[ReceiptWithTTL]]:
        """See `Store.receipts`. A walk over all keys: for a migration. Hash slots must not move meanwhile."""
        return scan(self._use().topology.owners(), self._connector, self._keys)

    async def remember(self, name: str, incarnation: int, receipts: Sequence[ReceiptWithTTL]) -> Committed | Missing:
        """See `Store.remember`."""
        return await remember(self._use().calls, self._keys, name, incarnation, receipts)

    async def _create(self, opened: _Opened, name: str, parts: Sequence[bytes], limit: int) -> Any:
        created = False
        room = opened.counter.begin(limit)
        try:
            args: list[bytes | int] = [*parts, name.encode(), int(room), self._waits]
            reply = await opened.calls.run(CREATE, bucket_of(name), self._bucket_keys(name), args)
            created = reply[0] == Answer.DONE
        finally:
            opened.counter.end(created)
        return reply

    def _bucket_keys(self, name: str) -> Sequence[bytes]:
        bucket = bucket_of(name)
        return (self._keys.record(name), self._keys.names(bucket), self._keys.floor(bucket))

    def _pipeline(self, node: Node) -> Pipeline:
        return Pipeline(partial(self._connector.connect, node), self._limits, self._runtime)

    def _use(self) -> _Opened:
        if self._opened is None:
            raise StoreError("the Valkey store is not open")
        return self._opened


def from_url(url: str, options: StoreOptions) -> ValkeyStore:
    """The store of `valkey://...` and its like. Raises `StoreRefusedError`."""
    return ValkeyStore(
        url,
        options.receipt_seconds,
        connections=options.connections,
        timeout=options.timeout,
        wait_replicas=options.wait_replicas,
        wait_timeout=options.wait_timeout,
    )


def _outcome(reply: Sequence[Any], keys: Sequence[bytes]) -> Committed | Conflict | Missing | Duplicates:
    match reply[0]:
        case Answer.DONE:
            return Committed(reply[1] if len(reply) > 1 else None)
        case Answer.CONFLICT:
            return Conflict(unpack_record(reply[1]) if len(reply) > 1 else None)
        case Answer.MISSING:
            return Missing()
        case _:
            return Duplicates(_receipts(reply, keys))


def _receipts(reply: Sequence[Any], keys: Sequence[bytes]) -> tuple[Receipt, ...]:
    found = zip(reply[1::2], reply[2::2], strict=True)
    return tuple(unpack_receipt(keys[position], data) for position, data in found)
