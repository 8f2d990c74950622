"""Synchronized batches: several callers each bring a shard, and each is answered with the statistics of the whole.

Members meet in the store, never in a process's memory, so they may come to any replica, and what came survives a crash.
A group closes by a commit: its totals and its members are written as a receipt, together with the fold. Whoever closes
it, the receipt decides: a member finds its answer there, also when it comes again, and a late one that it is late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from batchnorm_client.wire.errors import (
    GroupClosed,
    GroupIncomplete,
    GroupMismatch,
    IdempotencyKeyReused,
    StoreUnavailable,
)

from ..runtime import Runtime
from ..store.base import GroupStatus, Missing, Shard, Store, StoreError
from .group_result import GroupResult
from .idempotency import IdempotencyToken, group_token
from .update_queue import Queue
from .updates import ReplacedError, refuse_reuse

T = TypeVar("T")

_FIRST_PAUSE: Final = 0.002  # seconds between two looks at a group that another process may complete
_LONGEST_PAUSE: Final = 0.1


@dataclass(frozen=True, slots=True)
class GroupCall:
    """Which group a call wants to join.

    Attributes:
        id: the group's name; of one synchronized batch, not of one set of callers.
        size: how many members it has.
        timeout: seconds that this member waits for the others.
    """

    id: str
    size: int
    timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What a closed group says to a member.

    Attributes:
        whole: the parts of all, merged.
        version: of the commit that closed the group.
        batch: `num_batches_tracked` after it.
        replayed: another call had brought this member's shard before.
    """

    whole: T
    version: int
    batch: int
    replayed: bool


class Operation(Protocol[T]):
    """What a kind of group does with its parts.

    Attributes:
        name: groups of different operations may have the same id.
        folds: whether result the group changes the layer, so that its members' keys stand for nothing else.
        incarnation: of the layer that the call was meant for; groups of another are others.
    """

    name: str
    folds: bool
    incarnation: int

    def pack(self, part: T) -> bytes:
        """A part, or the whole, as bytes."""
        ...

    def unpack(self, data: bytes) -> T:
        """The inverse of `pack`."""
        ...

    def merge(self, parts: list[T]) -> T:
        """The whole of the parts."""
        ...

    async def close(
        self, token: IdempotencyToken, whole: T, members: Mapping[bytes, bytes], result: Callable[[bytes], bytes]
    ) -> None:
        """Commit the whole under the group's token, with `result(totals)` as the receipt's payload.

        `members` are the fingerprints of the parts by their keys.
        Raises `ProblemError` for what cannot be committed: nothing is, and every member is told.
        """
        ...


class Groups:
    """The groups of one layer."""

    def __init__(self, name: str, store: Store, queue: Queue, runtime: Runtime) -> None:
        self._runtime = runtime
        self._name = name
        self._store = store
        self._queue = queue
        self._notifiers: dict[bytes, _Notifier] = {}

    async def join(self, call: GroupCall, member: IdempotencyToken, part: T, operation: Operation[T]) -> Outcome[T]:
        """Wait until the group is complete and its fold is durable.

        Raises:
            GroupIncomplete: not all members came in time; nothing was folded.
            GroupClosed: this member comes too late, or is one too many.
            GroupMismatch: the group has another size.
            IdempotencyKeyReused: the key was used for another batch, shard or group.
            ReplacedError: the layer is no more.
            ProblemError: what folding the whole refuses; all members are told.
        """
        name = group_token(operation.name, call.id)
        shard = Shard(member.key, member.fingerprint, operation.pack(part))
        deadline, pause, came, added = self._runtime.now() + call.timeout, _FIRST_PAUSE, False, False
        try:
            with self._listening(name) as notifier:
                while True:
                    event = notifier.event
                    found = await self._queue.find_all([name, member], operation.incarnation)
                    if (receipt := found.get(name.key)) is not None:
                        whole = operation.unpack(_told(GroupResult.unpack(receipt.payload), call, member))
                        return Outcome(whole, receipt.version, receipt.batch, replayed=not added)
                    if not came and operation.folds and (own := found.get(member.key)) is not None:
                        refuse_reuse(member, own)
                    status = await self._gather(name, call, shard, operation)
                    _check_member(status.size, status.members, call, member)
                    came, added = True, added or status.added
                    if status.parts:
                        await self._close(name, status, operation)
                    elif self._runtime.now() >= deadline:
                        payload = GroupResult(status.size, dict(status.members), b"").pack()
                        await self._queue.note(name, operation.incarnation, payload)
                    else:
                        await self._first(event.wait(), min(pause, max(0.0, deadline - self._runtime.now())))
                        pause = min(2 * pause, _LONGEST_PAUSE)
                        continue
                    notifier.tell()
        except asyncio.CancelledError:
            if not member.from_caller:  # one with a key may come back for its answer
                await asyncio.shield(self._leave(name, operation, member.key))
            raise

    async def _gather(
        self, name: IdempotencyToken, call: GroupCall, shard: Shard, operation: Operation[T]
    ) -> GroupStatus:
        try:
            found = await self._store.join(self._name, operation.incarnation, name.key, call.size, shard)
        except StoreError as error:
            raise StoreUnavailable(f"the store does not answer: {error}", retry_after=1) from error
        if isinstance(found, Missing):
            raise ReplacedError
        return found

    async def _close(self, name: IdempotencyToken, status: GroupStatus, operation: Operation[T]) -> None:
        whole = operation.merge([operation.unpack(part) for part in status.parts])
        members = dict(status.members)
        await operation.close(name, whole, members, lambda totals: GroupResult(status.size, members, totals).pack())
        await self._leave(name, operation, None)  # what came is in the receipt now

    async def _leave(self, name: IdempotencyToken, operation: Operation[T], member: bytes | None) -> None:
        with suppress(StoreError):  # shards that stay behind expire like receipts
            await self._store.leave(self._name, operation.incarnation, name.key, member)

    async def _first(self, notified: Awaitable[object], seconds: float) -> None:
        """Wait for a notification, but no longer than this."""
        with suppress(TimeoutError):
            async with self._runtime.timeout(seconds):
                await notified

    @contextmanager
    def _listening(self, name: IdempotencyToken) -> Iterator[_Notifier]:
        notifier = self._notifiers.setdefault(name.key, _Notifier())
        notifier.listeners += 1
        try:
            yield notifier
        finally:
            notifier.listeners -= 1
            if notifier.listeners == 0:
                del self._notifiers[name.key]


class _Notifier:
    """Wakes the members of a group that are in this process, so that they need not wait for their next look."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.listeners = 0

    def tell(self) -> None:
        """The group has closed."""
        self.event.set()
        self.event = asyncio.Event()


def _told(result: GroupResult, call: GroupCall, member: IdempotencyToken) -> bytes:
    """The totals of a closed group, for one of its members."""
    _check_member(result.size, result.members, call, member)
    if not result.totals:
        came = len(result.members)
        raise GroupIncomplete(
            f"{came} of {call.size} members of group {call.id!r} came in time; nothing was folded",
            field="group",
            expected=call.size,
            got=came,
        )
    return result.totals


def _check_member(size: int, members: Mapping[bytes, bytes], call: GroupCall, member: IdempotencyToken) -> None:
    """Refuse a call that is none of the group's members."""
    if size != call.size:
        raise GroupMismatch(f"group {call.id!r} has {size} members", field="size", expected=size, got=call.size)
    fingerprint = members.get(member.key)
    if fingerprint is None:
        raise GroupClosed(f"group {call.id!r} is closed", field="group", expected="a new group id", got=call.id)
    if fingerprint != member.fingerprint:
        raise IdempotencyKeyReused(
            "a member with this Idempotency-Key has brought another shard",
            field="Idempotency-Key",
            expected="a key of its own for each member",
        )
