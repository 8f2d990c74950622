"""The simulated store: a server whose writes become durable with time, and replicas' connections to it.

The server's table is the service's `MemoryStore`, which passes the conformance suite; so does `SimulatedStore`. What is
added is distance and trouble: calls and replies take time, are lost, or come late; writes are answered once they are
durable; a crash (a power failure, or a failover to a server that lags) loses a suffix of those that are not.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from batchnorm_service.runtime import Runtime
from batchnorm_service.store.base import (
    Attachment,
    Committed,
    Entry,
    GroupStatus,
    Missing,
    Pin,
    Receipt,
    ReceiptWithTTL,
    Record,
    Shard,
    Stamp,
    StoreError,
    Unchanged,
)
from batchnorm_service.store.memory import MemoryStore
from simulation.faults import Faults
from simulation.loop import Process

CALL_TIMEOUT = 2.0
"""Seconds after which a replica no longer waits for a reply."""


class Applied(NamedTuple):
    """A write that the server applied, for the checker.

    Attributes:
        at: when.
        name: of the record.
        before, after: the record; None where there is none.
        receipts: that were written with it.
    """

    at: float
    name: str
    before: Record | None
    after: Record | None
    receipts: tuple[Receipt, ...]


@dataclass(slots=True)
class Newest:
    """A time in which a record was the newest.

    Attributes:
        record: None where there was none.
        since: when it was written, or a crash brought it back.
        until: when its successor was written, or the crash. An embedded store's readers may use what they know until
            the successor is durable: its writer has not been told before.
    """

    record: Record | None
    since: float
    until: float = float("inf")


@dataclass(slots=True)
class Pinned:
    """A time in which a layer had these pins.

    Attributes:
        versions: by tag.
        since, until: as of `Newest`.
    """

    versions: Mapping[str, int]
    since: float
    until: float = float("inf")


class _Snapshot(NamedTuple):
    """The table after a write.

    Attributes:
        number: of the write.
        content: the table's.
        applied: how long the log is.
    """

    number: int
    content: dict[str, Any]
    applied: int


class Server:
    """The machine that keeps the records.

    Attributes:
        table: the records.
        log: the writes that were applied and not undone, in order.
        history: by name, when each record was the newest: also what a crash undid.
        pinned: by name, when it had which pins: also what a crash undid.
        away: whether it refuses connections.
        process: where it works.
    """

    def __init__(
        self, random: Random, faults: Faults, receipt_seconds: float, runtime: Runtime, *, embedded: bool = False
    ) -> None:
        self._random = random
        self._embedded = embedded
        self._faults = faults
        self.now = runtime.now
        self.table = MemoryStore(receipt_seconds, exclusive=False, runtime=runtime)
        self.log: list[Applied] = []
        self.history: dict[str, list[Newest]] = {}
        self.pinned: dict[str, list[Pinned]] = {}
        self.away = False
        self.process = Process("server")
        self._writes = 0
        self._crashes = 0
        self._synced_at = 0.0
        self._snapshots = deque([self._snapshot()])  # of the newest durable write, and of each after it

    def _snapshot(self) -> _Snapshot:
        return _Snapshot(self._writes, self.content(), len(self.log))

    def content(self) -> dict[str, Any]:
        """A copy of the table. Records, receipts and pins are immutable, groups are not."""
        state = vars(self.table)
        content = {name: copy.copy(value) for name, value in state.items() if isinstance(value, dict | list)}
        content |= {"_groups": copy.deepcopy(state["_groups"]), "_floor": state["_floor"]}
        each_copied = ("_kept", "_pins", "_attachments")
        content |= {each: {key: dict(value) for key, value in state[each].items()} for each in each_copied}
        return content

    def restore(self, content: dict[str, Any]) -> None:
        """Undo what was written since the copy."""
        vars(self.table).update(content)

    async def apply(self, name: str, work: Callable[[MemoryStore], Any], receipts: Sequence[Receipt] = ()) -> Any:
        """Do a write. Returns its reply, once it and all that it rests on are durable.

        Raises:
            StoreError: the server crashed before.
        """
        before = self.table._records.get(name)
        reply = await work(self.table)
        after = self.table._records.get(name)
        unpinned = self.note_pins(name, self.pins(name))
        overtaken: Newest | None = None
        written = tuple(receipts) if isinstance(reply, Committed) else ()
        if after is not before or written:
            self.log.append(Applied(self.now(), name, before, after, written))
            overtaken = self.note(name, after)
            if not self._embedded and overtaken.record is not None:
                overtaken.until = self.now()
        if unpinned is not None and not self._embedded:
            unpinned.until = self.now()
        self._writes += 1
        self._snapshots.append(self._snapshot())
        number, crashes = self._writes, self._crashes
        if self._random.random() < self._faults.crash_after_write:
            self.process.spawn(self._crash_soon())
        if self._faults.sync:
            synced = self.now() + self._random.expovariate(1 / self._faults.sync)
            self._synced_at = max(self._synced_at, synced)  # what is durable takes along what came before
            await asyncio.sleep(self._synced_at - self.now())
        if crashes != self._crashes:
            raise StoreError("the server crashed")
        for each in (overtaken, unpinned):
            if each is not None:
                each.until = min(each.until, self.now())
        while self._snapshots[0].number < number:
            self._snapshots.popleft()
        return reply

    async def _crash_soon(self) -> None:
        await asyncio.sleep(self._random.uniform(0, self._faults.sync))
        self.crash()

    def note(self, name: str, record: Record | None) -> Newest:
        """Another record is the newest; returns the one before."""
        known = self.history.setdefault(name, [Newest(None, 0.0)])
        known.append(Newest(record, self.now()))
        return known[-2]

    def pins(self, name: str) -> dict[str, int]:
        """The versions of the layer's pins, by tag."""
        record = self.table._records.get(name)
        found = {} if record is None else self.table._pins.get(record.stamp.incarnation, {})
        return {tag: pin.version for tag, pin in found.items()}

    def note_pins(self, name: str, versions: Mapping[str, int]) -> Pinned | None:
        """The layer has these pins now; returns those before, if they are others."""
        known = self.pinned.setdefault(name, [Pinned({}, 0.0)])
        if known[-1].versions == versions:
            return None
        known.append(Pinned(versions, self.now()))
        return known[-2]

    def crash(self) -> None:
        """Lose some of the newest writes that are not durable, and answer none of them."""
        kept = self._snapshots[self._random.randrange(len(self._snapshots))]
        self.restore(kept.content)
        for name in {applied.name: None for applied in self.log[kept.applied :]}:
            for one in self.history[name]:
                one.until = min(one.until, self.now())
            self.note(name, self.table._records.get(name))
        for name in self.pinned:
            if (lost := self.note_pins(name, self.pins(name))) is not None:
                lost.until = min(lost.until, self.now())
        del self.log[kept.applied :]
        self._crashes += 1
        self._snapshots = deque([self._snapshot()])


class SimulatedStore:
    """A replica's connection to the server.

    Args:
        server: it.
        random: the world's.
        faults: how often what goes wrong.
        exclusive: nobody else is connected: an embedded store, which dies with its process and loses no message.
    """

    def __init__(self, server: Server, random: Random, faults: Faults, *, exclusive: bool = False) -> None:
        self.exclusive = exclusive
        self.url = "simulated:"
        self._server = server
        self._random = random
        self._faults = faults
        self._open = False
        self._arrival = 0.0  # of the newest message: those of one connection arrive in the order they were sent in

    async def open(self) -> None:
        await self._server.table.open()
        self._open = True

    async def close(self) -> None:
        self._open = False

    async def _call(self, work: Callable[[], Awaitable[Any]]) -> Any:
        if not self._open:
            raise StoreError("the store is not open")
        if self.exclusive:
            await asyncio.sleep(self._faults.store_way(self._random))
            self._maybe_full()
            return await work()
        loop, faults, random = asyncio.get_running_loop(), self._faults, self._random
        self._arrival = max(self._arrival, loop.time() + faults.store_way(random))
        if random.random() < faults.store_late:
            self._arrival += CALL_TIMEOUT + random.uniform(0, 2 * CALL_TIMEOUT)
        reply: asyncio.Future[Any] = loop.create_future()
        if random.random() >= faults.store_request_lost:
            self._server.process.spawn(self._serve(work, self._arrival - loop.time(), reply))
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                return await reply
        except TimeoutError:
            self._arrival = 0.0  # a new connection, whose messages may overtake those of the old one
            raise StoreError("no reply") from None

    async def _serve(self, work: Callable[[], Awaitable[Any]], way: float, reply: asyncio.Future[Any]) -> None:
        await asyncio.sleep(way)
        answer: Any = StoreError("connection refused")
        if not self._server.away:
            try:
                self._maybe_full()
                answer = await work()
            except StoreError as error:
                answer = error
        if self._random.random() < self._faults.store_reply_lost:
            return
        await asyncio.sleep(self._faults.store_way(self._random))
        if not reply.done():
            reply.set_exception(answer) if isinstance(answer, StoreError) else reply.set_result(answer)

    def _maybe_full(self) -> None:
        if self._random.random() < self._faults.disk_full:
            raise StoreError("the disk is full")

    async def _write(self, name: str, work: Callable[[MemoryStore], Any], receipts: Sequence[Receipt] = ()) -> Any:
        return await self._call(lambda: self._server.apply(name, work, receipts))

    async def _read(self, work: Callable[[MemoryStore], Any]) -> Any:
        return await self._call(lambda: work(self._server.table))

    async def ping(self) -> None:
        await self._read(lambda table: table.ping())

    async def load(self, name: str, unless: Stamp | None = None) -> Record | Unchanged | Missing:
        return await self._read(lambda table: table.load(name, unless))

    async def create(self, name: str, data: bytes, limit: int) -> Any:
        return await self._write(name, lambda table: table.create(name, data, limit))

    async def commit(
        self, name: str, expected: Stamp, record: Record | None, receipts: Sequence[Receipt], keep: int = 0
    ) -> Any:
        return await self._write(name, lambda table: table.commit(name, expected, record, receipts, keep), receipts)

    async def find_receipts(self, name: str, incarnation: int, keys: Sequence[bytes]) -> Any:
        return await self._write(name, lambda table: table.find_receipts(name, incarnation, keys))

    async def delete(self, name: str, expected: Stamp, *, with_pins: bool = False) -> Any:
        return await self._write(name, lambda table: table.delete(name, expected, with_pins=with_pins))

    async def kept(self, name: str) -> Any:
        return await self._read(lambda table: table.kept(name))

    async def load_kept(self, name: str, at: int | str, unless: Stamp | None = None) -> Any:
        return await self._read(lambda table: table.load_kept(name, at, unless))

    async def pin(self, name: str, stamp: Stamp | None, tag: str, data: bytes, limit: int) -> Any:
        return await self._write(name, lambda table: table.pin(name, stamp, tag, data, limit))

    async def pins(self, name: str) -> Any:
        return await self._read(lambda table: table.pins(name))

    async def unpin(self, name: str, incarnation: int, tag: str, keep: int) -> Any:
        return await self._write(name, lambda table: table.unpin(name, incarnation, tag, keep))

    async def import_history(self, name: str, incarnation: int, kept: Sequence[Record], pins: Sequence[Pin]) -> Any:
        return await self._write(name, lambda table: table.import_history(name, incarnation, kept, pins))

    async def join(self, name: str, incarnation: int, group: bytes, size: int, shard: Shard) -> GroupStatus | Missing:
        return await self._write(name, lambda table: table.join(name, incarnation, group, size, shard))

    async def leave(self, name: str, incarnation: int, group: bytes, member: bytes | None) -> None:
        await self._write(name, lambda table: table.leave(name, incarnation, group, member))

    async def attachment(self, name: str, incarnation: int, key: str) -> Any:
        return await self._read(lambda table: table.attachment(name, incarnation, key))

    async def attach(self, name: str, incarnation: int, key: str, new: Attachment, expected: int | None) -> Any:
        return await self._write(name, lambda table: table.attach(name, incarnation, key, new, expected))

    async def list(self, prefix: str, after: str, limit: int) -> list[Entry]:
        return await self._read(lambda table: table.list(prefix, after, limit))

    async def receipts(self) -> AsyncIterator[Sequence[ReceiptWithTTL]]:
        async for some in self._server.table.receipts():
            yield some

    async def import_receipts(
        self, name: str, incarnation: int, receipts: Sequence[ReceiptWithTTL]
    ) -> Committed | Missing:
        return await self._write(name, lambda table: table.import_receipts(name, incarnation, receipts))
