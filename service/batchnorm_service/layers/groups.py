"""Synchronized batches: several callers each send a shard, and each gets the statistics of the whole batch.

Shards are kept in the store, so members may use different replicas, and a crash loses no shard. A group is closed by a
commit that writes its members and merged totals as a receipt, together with the fold. Members read their result from
that receipt: retries get the same result, and a member that is too late is refused.
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
    Overloaded,
    StoreUnavailable,
)

from ..runtime import Runtime
from ..store.base import GroupStatus, Missing, Shard, Store, StoreError
from ..telemetry.layers import LayerMetrics
from .group_result import GroupResult
from .idempotency import IdempotencyToken, group_token
from .results import LayersOptions
from .store_calls import StoreCalls
from .update_queue import UpdateQueue
from .updates import ReplacedError, refuse_reuse

T = TypeVar("T")

_MIN_POLL_SECONDS: Final = 0.002  # between two reads of a group that another process may complete
_MAX_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class GroupCall:
    """The group that a call joins.

    Attributes:
        id: the group's name, unique to one synchronized batch.
        size: how many members it has.
        timeout: seconds that this member waits for the others.
    """

    id: str
    size: int
    timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """Result of a closed group for one member.

    Attributes:
        whole: the merged parts of all members.
        version: the version after the commit that closed the group.
        batch: `num_batches_tracked` after it.
        replayed: whether an earlier call had added this member's shard.
    """

    whole: T
    version: int
    batch: int
    replayed: bool


class Operation(Protocol[T]):
    """What a group computes: how parts are serialized and merged, and what is committed.

    Attributes:
        name: the namespace of group ids.
        folds: whether closing the group changes the layer; then each member's key gets a receipt.
        incarnation: of the layer that the call was prepared for; another incarnation has its own groups.
    """

    name: str
    folds: bool
    incarnation: int

    def pack(self, part: T) -> bytes:
        """Serialize a part, or the whole."""
        ...

    def unpack(self, data: bytes) -> T:
        """The inverse of `pack`."""
        ...

    def merge(self, parts: list[T]) -> T:
        """Merge all parts into the whole."""
        ...

    async def close(
        self, token: IdempotencyToken, whole: T, members: Mapping[bytes, bytes], result: Callable[[bytes], bytes]
    ) -> None:
        """Commit the whole under the group's token, with `result(totals)` as the receipt's payload.

        `members` has the parts' fingerprints by key. Raises `ProblemError` if the whole is refused: then nothing is
        committed, and every member raises it.
        """
        ...


class Groups:
    """The groups of one layer."""

    def __init__(
        self,
        name: str,
        store: Store,
        queue: UpdateQueue,
        calls: StoreCalls,
        options: LayersOptions,
        runtime: Runtime,
        metrics: LayerMetrics,
    ) -> None:
        self._max_waiting = options.max_waiting_members
        self._runtime = runtime
        self._name = name
        self._store = store
        self._queue = queue
        self._calls = calls
        self._metrics = metrics
        self._notifiers: dict[bytes, _Notifier] = {}

    async def join(self, call: GroupCall, member: IdempotencyToken, part: T, operation: Operation[T]) -> Outcome[T]:
        """Wait until the group is complete and its fold is durable.

        Raises:
            GroupIncomplete: not all members joined in time; nothing was folded.
            GroupClosed: the group is closed or full, and this call is not one of its members.
            GroupMismatch: the group has another size.
            IdempotencyKeyReused: the key was used for another batch, shard or group.
            Overloaded: too many members of any groups wait, here. Nothing was done.
            ReplacedError: the layer was deleted.
            ProblemError: folding the whole was refused; every member raises it.
        """
        if self._metrics.waiting_in_groups >= self._max_waiting:
            raise Overloaded(
                f"{self._max_waiting} calls wait for the other members of their groups:"
                " BATCHNORM_MAX_CONCURRENT_REQUESTS leaves the rest to other calls",
                retry_after=1,
            )
        name = group_token(operation.name, call.id)
        shard = Shard(member.key, member.fingerprint, operation.pack(part))
        deadline, pause, joined, added = self._runtime.now() + call.timeout, _MIN_POLL_SECONDS, False, False
        try:
            with self._listening(name) as notifier:
                while True:
                    event = notifier.event
                    found = await self._calls.find_all([name, member], operation.incarnation)
                    if (receipt := found.get(name.key)) is not None:
                        whole = operation.unpack(_totals(GroupResult.unpack(receipt.payload), call, member))
                        return Outcome(whole, receipt.version, receipt.batch, replayed=not added)
                    if not joined and operation.folds and (own := found.get(member.key)) is not None:
                        refuse_reuse(member, own)
                    status = await self._add_shard(name, call, shard, operation)
                    _check_member(status.size, status.members, call, member)
                    joined, added = True, added or status.added
                    if status.parts:
                        await self._close(name, status, operation)
                    elif self._runtime.now() >= deadline:
                        payload = GroupResult(status.size, dict(status.members), b"").pack()
                        await self._queue.note(name, operation.incarnation, payload)
                    else:
                        await self._wait_at_most(event.wait(), min(pause, max(0.0, deadline - self._runtime.now())))
                        pause = min(2 * pause, _MAX_POLL_SECONDS)
                        continue
                    notifier.notify()
        except asyncio.CancelledError:
            if not member.from_caller:  # a caller with a key may retry and needs its shard to be there
                await asyncio.shield(self._leave(name, operation, member.key))
            raise

    async def _add_shard(
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
        await self._leave(name, operation, None)  # the receipt has the totals: shards are no longer needed

    async def _leave(self, name: IdempotencyToken, operation: Operation[T], member: bytes | None) -> None:
        with suppress(StoreError):  # shards that are not removed expire like receipts
            await self._store.leave(self._name, operation.incarnation, name.key, member)

    async def _wait_at_most(self, notified: Awaitable[object], seconds: float) -> None:
        """Wait for a notification, or until the time is over."""
        with suppress(TimeoutError):
            async with self._runtime.timeout(seconds):
                await notified

    @contextmanager
    def _listening(self, name: IdempotencyToken) -> Iterator[_Notifier]:
        notifier = self._notifiers.setdefault(name.key, _Notifier())
        notifier.listeners += 1
        self._metrics.waiting_in_groups += 1
        try:
            yield notifier
        finally:
            notifier.listeners -= 1
            self._metrics.waiting_in_groups -= 1
            if notifier.listeners == 0:
                del self._notifiers[name.key]


class _Notifier:
    """Event that wakes the members of a group in this process when it closes, before they poll the store again."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.listeners = 0

    def notify(self) -> None:
        """Wake all current listeners."""
        self.event.set()
        self.event = asyncio.Event()


def _totals(result: GroupResult, call: GroupCall, member: IdempotencyToken) -> bytes:
    """The totals of a closed group, for one of its members."""
    _check_member(result.size, result.members, call, member)
    if not result.totals:
        count = len(result.members)
        raise GroupIncomplete(
            f"{count} of {call.size} members of group {call.id!r} came in time; nothing was folded",
            field="group",
            expected=call.size,
            got=count,
        )
    return result.totals


def _check_member(size: int, members: Mapping[bytes, bytes], call: GroupCall, member: IdempotencyToken) -> None:
    """Raise unless the call is a member of the group, with the same shard."""
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
