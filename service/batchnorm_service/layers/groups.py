"""Synchronized batches: several callers each bring a shard, and each is answered with the statistics of the whole.

A group is open in memory until all its members have come; nothing of it is acknowledged before that. When it closes,
its totals and its members are kept as a receipt, in the same commit as the fold: a member that lost its answer gets it
again, whatever crashed meanwhile, and a late one is told that it is late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from batchnorm_client.errors import GroupClosed, GroupIncomplete, GroupMismatch, IdempotencyKeyReused

from .changes import Done
from .closings import Closing
from .queue import Queue
from .receipts import Ticket, group_ticket
from .resident import Resident

T = TypeVar("T")


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


@dataclass(slots=True, eq=False)
class Member(Generic[T]):
    """One caller's part.

    Attributes:
        ticket: who it is: its Idempotency-Key, or a random one.
        part: what the others need to know of its shard.
    """

    ticket: Ticket
    part: T


@dataclass(slots=True, eq=False)
class Outcome(Generic[T]):
    """What a closed group says to a member.

    Attributes:
        whole: the parts of all, merged.
        done: the commit that closed the group.
    """

    whole: T
    done: Done


@dataclass(slots=True, eq=False)
class _Open(Generic[T]):
    size: int
    incarnation: int
    members: dict[bytes, Member[T]] = field(default_factory=dict)
    closing: asyncio.Task[None] | None = None
    deadline: asyncio.TimerHandle | None = None
    outcome: asyncio.Future[Outcome[T]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Operation(Generic[T]):
    """What a kind of group does with its parts.

    Attributes:
        name: groups of different operations may have the same id.
        incarnation: of the layer that the call was meant for; groups of another are others.
        merge: makes the whole of the parts.
        commit: makes the whole durable, with the closing as its receipt's payload; answers with what was committed.
        pack: the whole as bytes.
        unpack: the inverse of `pack`.
    """

    name: str
    incarnation: int
    merge: Callable[[list[T]], T]
    commit: Callable[[Ticket, T, list[Member[T]], bytes], Awaitable[Done]]
    pack: Callable[[T], bytes]
    unpack: Callable[[bytes], T]


class Groups:
    """The groups of one layer that are open in this process."""

    def __init__(self, resident: Resident, queue: Queue) -> None:
        self._resident = resident
        self._queue = queue
        self._open: dict[tuple[int, bytes], _Open[Any]] = {}

    @property
    def idle(self) -> bool:
        """Whether no group is open."""
        return not self._open

    async def join(self, call: GroupCall, member: Member[T], operation: Operation[T]) -> Outcome[T]:
        """Wait until the group is complete and its fold is durable.

        Raises:
            GroupIncomplete: not all members came in time; nothing was folded.
            GroupClosed: this member comes too late, or is one too many.
            GroupMismatch: the group has another size.
            IdempotencyKeyReused: a member with this key has brought another shard.
            ProblemError: what folding the whole refuses; all members are told.
        """
        name = group_ticket(operation.name, call.id)
        key = (operation.incarnation, name.key)
        if key not in self._open and (found := await self._queue.find(name)) is not None:
            return await self._again(Closing.unpack(found.payload), found.version, found.batch, call, member, operation)
        group: _Open[T] = self._open.setdefault(key, _Open(call.size, operation.incarnation))
        if group.size != call.size:
            raise _mismatch(call, group.size)
        twin = group.members.get(member.ticket.key)
        if twin is not None and twin.ticket.fingerprint != member.ticket.fingerprint:
            raise _reused()
        if twin is None:
            self._admit(name, group, call, member, operation)
        try:
            outcome = await asyncio.shield(group.outcome)
        except asyncio.CancelledError:
            self._withdraw(name, group, member)
            raise
        if twin is not None:
            return Outcome(outcome.whole, _repeated(outcome.done))
        return outcome

    def _admit(
        self, name: Ticket, group: _Open[T], call: GroupCall, member: Member[T], operation: Operation[T]
    ) -> None:
        if group.closing is not None:
            raise _closed(call)
        group.members[member.ticket.key] = member
        loop = asyncio.get_running_loop()
        if len(group.members) == group.size:
            group.closing = loop.create_task(self._close(name, group, operation))
        elif group.deadline is None or loop.time() + call.timeout < group.deadline.when():
            if group.deadline is not None:
                group.deadline.cancel()
            group.deadline = loop.call_later(call.timeout, self._expire, name, group, call)

    def _withdraw(self, name: Ticket, group: _Open[T], member: Member[T]) -> None:
        """A member without a key whose caller hung up is none; one with a key may come back for its answer."""
        if group.closing is None and not member.ticket.from_caller:
            group.members.pop(member.ticket.key, None)
            if not group.members:
                self._drop(name, group)

    def _expire(self, name: Ticket, group: _Open[T], call: GroupCall) -> None:
        if group.closing is None:
            group.closing = asyncio.get_running_loop().create_task(self._give_up(name, group, call))

    async def _close(self, name: Ticket, group: _Open[T], operation: Operation[T]) -> None:
        try:
            members = list(group.members.values())
            whole = operation.merge([member.part for member in members])
            closing = _closing(group, operation.pack(whole))
            done = await operation.commit(name, whole, members, closing.pack())
            if done.replayed:
                raise _closed_elsewhere()
            group.outcome.set_result(Outcome(whole, done))
        except Exception as error:
            _fail(group, error)
        finally:
            self._drop(name, group)

    async def _give_up(self, name: Ticket, group: _Open[T], call: GroupCall) -> None:
        try:
            await self._queue.note(name, group.incarnation, _closing(group, b"").pack())
            raise _incomplete(call, len(group.members))
        except Exception as error:
            _fail(group, error)
        finally:
            self._drop(name, group)

    def _drop(self, name: Ticket, group: _Open[T]) -> None:
        if group.deadline is not None:
            group.deadline.cancel()
        self._open.pop((group.incarnation, name.key), None)

    async def _again(
        self, closing: Closing, version: int, batch: int, call: GroupCall, member: Member[T], operation: Operation[T]
    ) -> Outcome[T]:
        """The answer of a group that closed before this call came."""
        if closing.size != call.size:
            raise _mismatch(call, closing.size)
        fingerprint = closing.members.get(member.ticket.key)
        if fingerprint is None:
            raise _closed(call)
        if fingerprint != member.ticket.fingerprint:
            raise _reused()
        if not closing.totals:
            raise _incomplete(call, len(closing.members))
        held = await self._resident.fresh()
        return Outcome(operation.unpack(closing.totals), Done(held, version, batch, replayed=True))


def _closing(group: _Open[T], totals: bytes) -> Closing:
    members = {member.ticket.key: member.ticket.fingerprint for member in group.members.values()}
    return Closing(group.size, members, totals)


def _fail(group: _Open[T], error: Exception) -> None:
    group.outcome.set_exception(error)
    group.outcome.exception()  # a group whose callers have all gone has nobody to tell


def _repeated(done: Done) -> Done:
    return Done(done.held, done.version, done.batch, replayed=True)


def _mismatch(call: GroupCall, size: int) -> GroupMismatch:
    return GroupMismatch(f"group {call.id!r} has {size} members", field="size", expected=size, got=call.size)


def _closed(call: GroupCall) -> GroupClosed:
    return GroupClosed(f"group {call.id!r} is closed", field="group", expected="a new group id", got=call.id)


def _closed_elsewhere() -> GroupClosed:
    return GroupClosed("the group was closed by another process", field="group", expected="a new group id")


def _reused() -> IdempotencyKeyReused:
    return IdempotencyKeyReused(
        "a member with this Idempotency-Key has brought another shard",
        field="Idempotency-Key",
        expected="a key of its own for each member",
    )


def _incomplete(call: GroupCall, came: int) -> GroupIncomplete:
    return GroupIncomplete(
        f"{came} of {call.size} members of group {call.id!r} came in time; nothing was folded",
        field="group",
        expected=call.size,
        got=came,
    )
