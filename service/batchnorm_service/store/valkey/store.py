"""The store in Valkey, or Redis 7 and newer. See docs/durability.md."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from batchnorm_service.runtime import RUNTIME, Runtime
from batchnorm_service.store.base import (
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
from batchnorm_service.store.valkey import attachments
from batchnorm_service.store.valkey.address import Node, parse_address
from batchnorm_service.store.valkey.commands import CommandRunner
from batchnorm_service.store.valkey.connection import Connector
from batchnorm_service.store.valkey.history import History
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
from batchnorm_service.store.valkey.receipts import import_receipts, scan
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
    ReplyCode,
)
from batchnorm_service.store.valkey.topology import ClusterTopology

_MAX_RECREATIONS = 10  # how often a layer may be deleted and created again during one commit


@dataclass(frozen=True, slots=True)
class _Opened:
    """The objects that exist between `open` and `close`."""

    topology: ClusterTopology
    runner: CommandRunner
    counter: LayerCounter
    history: History


class ValkeyStore:
    """Table of records in Valkey.

    Every call is one script, and shares its round trip with other queued calls. Durability depends on the server's
    settings and on `wait_replicas`: with it, a WAIT follows every create, commit and delete on the same connection, and
    the call returns when that many replicas have the write. If too few confirm, it raises `StoreError`: the outcome is
    unknown, and repeating the call determines it. The repeat waits for the replicas too, since it writes again what it
    finds (a commit renews its receipts). Reads go to primaries without WAIT: they may see unacknowledged writes.

    Args:
        url: see `address`: `valkey://user:password@host:port/0`, `valkeys://`, `valkey+cluster://host,host`.
        receipt_seconds: time to live of receipts, by the server's clock.
        connections: number of connections to each server.
        timeout: seconds for a round trip, for connecting, and for retries while a slot is being migrated.
        wait_replicas: how many replicas must have a write before it is acknowledged. A failover is certain to lose
            nothing only if these are all replicas of a primary.
        wait_timeout: seconds to wait for them.
        runtime: clock, random numbers, tasks.

    Raises:
        StoreRefusedError: the URL or a number is invalid.
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
        self._waits = int(wait_replicas > 0)  # an argument of the scripts
        self._opened: _Opened | None = None

    async def open(self) -> None:
        """Connect, and check that every server is suitable. Raises `StoreRefusedError`."""
        if self._opened is not None:
            raise StoreError(f"{self.url} is open already")
        topology = ClusterTopology(self._connector, self._pipeline, self._connections, split=self._limits.replicas > 0)
        runner = CommandRunner(topology, self._limits.timeout, self._runtime)
        counter = LayerCounter(runner, self._keys, self._runtime)
        self._opened = _Opened(topology, runner, counter, History(runner, self._keys, self._waits))
        try:
            await topology.open()
            schema = await runner.run(SCHEMA, 0, [self._keys.schema()], [SCHEMA_VERSION])
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
        """Finish running calls, then disconnect."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            await opened.runner.finish()
            await opened.topology.close()

    async def ping(self) -> None:
        """Return if any server responds: its layers can be used.

        Raises:
            StoreError: no server responds.
        """
        opened = self._require_open()
        calls = [opened.runner.run(COUNT, bucket, [self._keys.names(bucket)]) for bucket in opened.topology.sample()]
        results = await asyncio.gather(*calls, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if len(failures) == len(results):
            raise failures[0]

    async def load(self, name: str, unless: Stamp | None = None) -> Record | Unchanged | Missing:
        """See `Store.load`."""
        known = pack_stamp(unless) if unless else b""
        reply = await self._require_open().runner.run(LOAD, bucket_of(name), [self._keys.record(name)], [known])
        if isinstance(reply, bytes):
            return unpack_record(reply)
        return Missing() if reply == ReplyCode.MISSING else Unchanged()

    async def create(self, name: str, data: bytes, limit: int) -> Record | Exists | Full:
        """See `Store.create`. Concurrent processes may exceed the limit by what they create within a second."""
        opened = self._require_open()
        incarnation, commit_id = self._runtime.bits(63), self._runtime.bits(63)
        create = partial(self._create, opened, name, (pack_number(incarnation), pack_number(commit_id), data))
        reply = await create(limit)
        if reply[0] == ReplyCode.FULL:  # other processes may have deleted layers since the last count
            await opened.counter.refresh()
            reply = await create(limit)
        if reply[0] == ReplyCode.FULL:
            return Full()
        if reply[0] == ReplyCode.EXISTS:
            return Exists(unpack_record(reply[1]))
        await opened.counter.refresh_if_old()
        return Record(Stamp(incarnation, unpack_number(reply[1]), commit_id), data)

    async def commit(
        self, name: str, expected: Stamp, record: Record | None, receipts: Sequence[Receipt], keep: int = 0
    ) -> Committed | Conflict | Missing | Duplicates:
        """See `Store.commit`."""
        runner = self._require_open().runner
        by_key = {receipt.key: receipt for receipt in receipts}
        data = b"" if record is None else pack_stamp(record.stamp) + record.data
        values = [pack_receipt(receipt) for receipt in by_key.values()]
        incarnation = expected.incarnation
        history: Sequence[bytes] = ()
        if keep > 0 and record is not None:
            history = self._keys.history(name)
        for _ in range(_MAX_RECREATIONS):
            own = (self._keys.receipt(name, incarnation, key) for key in by_key)
            keys = [self._keys.record(name), self._keys.contenders(name), *own, *history]
            args: list[bytes | int] = [pack_stamp(expected), pack_number(incarnation), self._receipt_milliseconds]
            args += [self._waits, keep if history else 0, data, *values]
            reply = await runner.run(COMMIT, bucket_of(name), keys, args)
            if reply[0] != ReplyCode.OTHER:
                return _outcome(reply, list(by_key))
            incarnation = unpack_number(reply[1])  # look for receipts in the incarnation that replaced the expected one
        raise StoreError("the layer is deleted and created again and again")

    async def find_receipts(self, name: str, incarnation: int, keys: Sequence[bytes]) -> tuple[Receipt, ...] | Missing:
        """See `Store.find_receipts`. With `wait_replicas`, found receipts cost a second round trip, with a WAIT."""
        runner, own = self._require_open().runner, list(dict.fromkeys(keys))
        names = [self._keys.record(name), *(self._keys.receipt(name, incarnation, key) for key in own)]
        reply = await runner.run(FIND, bucket_of(name), names, [pack_number(incarnation), 0])
        if self._waits and len(reply) > 1:
            reply = await runner.run(FIND_AND_WAIT, bucket_of(name), names, [pack_number(incarnation), 1])
        return Missing() if reply[0] == ReplyCode.MISSING else _receipts(reply, own)

    async def delete(
        self, name: str, expected: Stamp, *, with_pins: bool = False
    ) -> Committed | Conflict | Missing | Pinned:
        """See `Store.delete`."""
        opened = self._require_open()
        args: list[bytes | int] = [pack_stamp(expected), name.encode(), self._waits, int(with_pins)]
        reply = await opened.runner.run(DELETE, bucket_of(name), self._bucket_keys(name), args)
        if reply[0] == ReplyCode.PINNED:
            return Pinned()
        outcome = _outcome(reply, [])
        if isinstance(outcome, Committed):
            opened.counter.deleted()
        assert not isinstance(outcome, Duplicates)  # noqa: S101 - there were no receipts
        return outcome

    async def kept(self, name: str) -> tuple[Stamp, ...] | Missing:
        """See `Store.kept`."""
        return await self._require_open().history.kept(name)

    async def load_kept(
        self, name: str, at: int | str, unless: Stamp | None = None
    ) -> Record | Unchanged | NotKept | Missing:
        """See `Store.load_kept`."""
        return await self._require_open().history.load_kept(name, at, unless)

    async def pin(
        self, name: str, stamp: Stamp | None, tag: str, data: bytes, limit: int
    ) -> Committed | Pinned | Full | NotKept | Missing:
        """See `Store.pin`."""
        return await self._require_open().history.pin(name, stamp, tag, data, limit)

    async def pins(self, name: str) -> tuple[Pin, ...] | Missing:
        """See `Store.pins`."""
        return await self._require_open().history.pins(name)

    async def unpin(self, name: str, incarnation: int, tag: str, keep: int) -> Committed | NotKept | Missing:
        """See `Store.unpin`."""
        return await self._require_open().history.unpin(name, incarnation, tag, keep)

    async def import_history(
        self, name: str, incarnation: int, kept: Sequence[Record], pins: Sequence[Pin]
    ) -> Committed | Missing:
        """See `Store.import_history`."""
        return await self._require_open().history.import_history(name, incarnation, kept, pins)

    async def join(self, name: str, incarnation: int, group: bytes, size: int, shard: Shard) -> GroupStatus | Missing:
        """See `Store.join`."""
        keys = [self._keys.record(name), *self._keys.group(name, incarnation, group)]
        args: Sequence[bytes | int] = (pack_number(incarnation), shard.member, size, shard.fingerprint, shard.part)
        call = self._runtime.bytes(8)
        reply = await self._require_open().runner.run(
            JOIN, bucket_of(name), keys, (*args, self._receipt_milliseconds, call)
        )
        if reply[0] == ReplyCode.MISSING:
            return Missing()
        _, added, fields, parts = reply
        members = dict(sorted(zip(fields[::2], fields[1::2], strict=True)))
        size = int(members.pop(b"size"))
        by_member = sorted(zip(parts[::2], parts[1::2], strict=True))
        return GroupStatus(size, members, tuple(part for _, part in by_member), bool(added))

    async def leave(self, name: str, incarnation: int, group: bytes, member: bytes | None) -> None:
        """See `Store.leave`."""
        keys = self._keys.group(name, incarnation, group)
        await self._require_open().runner.run(LEAVE, bucket_of(name), keys, [member or b""])

    async def attachment(self, name: str, incarnation: int, key: str) -> Attachment | Missing | None:
        """See `Store.attachment`."""
        return await attachments.load(self._require_open().runner, self._keys, name, incarnation, key)

    async def attach(
        self, name: str, incarnation: int, key: str, new: Attachment, expected: int | None
    ) -> Committed | Conflict | Missing:
        """See `Store.attach`."""
        return await attachments.attach(self._require_open().runner, self._keys, name, incarnation, key, new, expected)

    async def list(self, prefix: str, after: str, limit: int) -> list[Entry]:
        """See `Store.list`. Concurrent changes may be included or not."""
        runner = self._require_open().runner
        entries: list[Entry] = []
        if limit <= 0:
            return entries
        names = Names(runner, self._keys, prefix, after, limit)
        while (missing := limit - len(entries)) > 0 and (page := await names.take(missing)):
            heads = (runner.run(HEAD, bucket_of(name), [self._keys.record(name)]) for name in page)
            for name, head in zip(page, await asyncio.gather(*heads), strict=True):
                if head:  # not deleted since its name was read
                    entry = unpack_record(head)
                    entries.append(Entry(name, entry.stamp, entry.data))
        return entries

    def receipts(self) -> AsyncIterator[Sequence[ReceiptWithTTL]]:
        """See `Store.receipts`. Scans all keys, for transfers. Hash slots must not be migrated meanwhile."""
        return scan(self._require_open().topology.owners(), self._connector, self._keys)

    async def import_receipts(
        self, name: str, incarnation: int, receipts: Sequence[ReceiptWithTTL]
    ) -> Committed | Missing:
        """See `Store.import_receipts`."""
        return await import_receipts(self._require_open().runner, self._keys, name, incarnation, receipts)

    async def _create(self, opened: _Opened, name: str, parts: Sequence[bytes], limit: int) -> Any:
        created = False
        room = opened.counter.begin_create(limit)
        try:
            args: list[bytes | int] = [*parts, name.encode(), int(room), self._waits]
            reply = await opened.runner.run(CREATE, bucket_of(name), self._bucket_keys(name), args)
            created = reply[0] == ReplyCode.DONE
        finally:
            opened.counter.end_create(created)
        return reply

    def _bucket_keys(self, name: str) -> Sequence[bytes]:
        bucket = bucket_of(name)
        record, history = self._keys.record(name), self._keys.history(name)
        own = (record, self._keys.names(bucket), self._keys.floor(bucket))
        return (*own, *history, self._keys.attachments(name))

    def _pipeline(self, node: Node) -> Pipeline:
        return Pipeline(partial(self._connector.connect, node), self._limits, self._runtime)

    def _require_open(self) -> _Opened:
        if self._opened is None:
            raise StoreError("the Valkey store is not open")
        return self._opened


def from_url(url: str, options: StoreOptions) -> ValkeyStore:
    """Create the store of a URL with one of `address.SCHEMES`. Raises `StoreRefusedError`."""
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
        case ReplyCode.DONE:
            return Committed(reply[1] if len(reply) > 1 else None)
        case ReplyCode.CONFLICT:
            return Conflict(unpack_record(reply[1]) if len(reply) > 1 else None)
        case ReplyCode.MISSING:
            return Missing()
        case _:
            return Duplicates(_receipts(reply, keys))


def _receipts(reply: Sequence[Any], keys: Sequence[bytes]) -> tuple[Receipt, ...]:
    found = zip(reply[1::2], reply[2::2], strict=True)
    return tuple(unpack_receipt(keys[position], data) for position, data in found)
