"""Per-layer update queue and its group-commit task: all queued folds are folded in order and committed at once."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from batchnorm_client.wire.errors import LayerPinned, Overloaded, ProblemError

from ..engine.posted import Posted
from ..runtime import Runtime
from ..store.base import (
    Committed,
    Conflict,
    Duplicates,
    Missing,
    Pinned,
    Receipt,
    Record,
    Stamp,
)
from ..telemetry import CURRENT_SPAN
from ..telemetry.layers import LayerMetrics
from .cached_state import CachedState, layer_not_found
from .compute import ComputeExecutor
from .contention import ContentionBackoff
from .group_commit import make_plan
from .idempotency import IdempotencyToken
from .kept_states import KeptStates
from .records import CommittedLayer, decode, record
from .results import LayersOptions
from .retention import Retention
from .store_calls import StoreCalls
from .updates import Change, Deletion, Done, Fold, Note, Queued, ReplacedError, check_version, replay, settle

_log = logging.getLogger(__name__)


class CommitObserver(Protocol):
    """What is told of commits, right after them. Its methods must not raise."""

    def folded(self, name: str, layer: CommittedLayer, moments: Sequence[Posted]) -> None:
        """Batches with these moments were folded into this state, unless its tracking is off."""
        ...

    def changed(self, name: str, before: CommittedLayer, after: CommittedLayer) -> None:
        """A reset, PATCH, PUT state or rollback has replaced this state by another one."""
        ...


class NoObserver:
    """A `CommitObserver` that does nothing."""

    def folded(self, name: str, layer: CommittedLayer, moments: Sequence[Posted]) -> None:
        """See `CommitObserver`."""

    def changed(self, name: str, before: CommittedLayer, after: CommittedLayer) -> None:
        """See `CommitObserver`."""


class UpdateQueue:
    """Per-layer update queue and group-commit task.

    An update is acknowledged after the store has confirmed its commit.
    """

    def __init__(
        self,
        cached: CachedState,
        kept: KeptStates,
        calls: StoreCalls,
        executor: ComputeExecutor,
        options: LayersOptions,
        runtime: Runtime,
        metrics: LayerMetrics,
        observer: CommitObserver,
    ) -> None:
        self._observer = observer
        self._cached = cached
        self._kept = kept
        self._calls = calls
        self._executor = executor
        self._length = options.queue_length
        self._retention = Retention(options.history_length, options.history_seconds)
        self._runtime = runtime
        self._backoff = ContentionBackoff()
        self._waiting: deque[Queued] = deque()
        self._task: asyncio.Task[None] | None = None
        self._metrics = metrics

    @property
    def idle(self) -> bool:
        """Whether no update is queued or being committed."""
        return self._task is None

    async def submit(self, queued: Queued) -> Done:
        """Queue an update and wait until it is committed.

        Raises:
            Overloaded: the queue is full; the update was not queued.
            StoreUnavailable: the store does not respond; the outcome may be unknown.
            ReplacedError: the update was prepared for a layer that was deleted and created again.
            ProblemError: the update is refused.
        """
        if len(self._waiting) >= self._length:
            raise Overloaded(
                f"{self._length} calls are waiting for layer {self._cached.name!r}: BATCHNORM_QUEUE_LENGTH",
                retry_after=1,
            )
        self._waiting.append(queued)
        self._metrics.queued += 1
        if self._task is None:
            self._task = self._runtime.create_task(self._drain())
        if (request := CURRENT_SPAN.get()) is None:
            return await queued.future
        with request.child("wait for the commit") as queued.span:
            return await queued.future

    async def note(self, token: IdempotencyToken, incarnation: int, payload: bytes) -> Done:
        """Commit a receipt and nothing else. Raises `LayerNotFound` if that incarnation was deleted."""
        return await self.submit(Note(token, incarnation, payload))

    async def drained(self) -> None:
        """Return when the queue is empty and the last commit is done."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def _drain(self) -> None:
        CURRENT_SPAN.set(None)  # the task has the context of the first call, but works for all
        try:
            while self._waiting:
                taken = self._take()
                try:
                    await self._process(taken)
                except ProblemError as error:
                    _settle_all(taken, error)
                except Exception as error:
                    _log.exception("a commit of layer %r failed", self._cached.name)
                    self._cached.set(None)
                    _settle_all(taken, error)
        finally:
            self._task = None

    def _take(self) -> list[Queued]:
        """The updates of the next commit: all folds at the head of the queue, or one update of another kind."""
        return self._take_folds() or [self._pop()]

    def _take_folds(self) -> list[Queued]:
        taken: list[Queued] = []
        while self._waiting and isinstance(self._waiting[0], Fold):
            taken.append(self._pop())
        return taken

    def _pop(self) -> Queued:
        self._metrics.queued -= 1
        return self._waiting.popleft()

    async def _process(self, taken: list[Queued]) -> None:
        match taken[0]:
            case Deletion() as deletion:
                await self._delete(deletion)
            case Change() as change:
                await self._change(change)
            case Note() as note:
                await self._note(note)
            case Fold():
                await self._fold(taken)

    async def _fold(self, taken: list[Queued]) -> None:
        deadline, losses = self._calls.deadline(), 0
        while folds := [waiting for waiting in taken if isinstance(waiting, Fold) and not waiting.future.done()]:
            layer = await self._cached.latest_known()
            began = self._runtime.now()
            plan = await make_plan(self._executor, self._runtime, self._retention, layer, folds)
            for waiting, error in plan.refused:
                await self._refuse(waiting, error)
            if not plan.folds:
                return
            outcome = await self._calls.commit(
                "folds", plan.updates, layer.stamp, plan.record, plan.receipts, deadline, plan.keep
            )
            self._backoff.record_duration(self._runtime.now() - began)
            match outcome:
                case Committed(contenders):
                    self._cached.set(plan.layer)
                    if plan.record is not None:
                        self._metrics.folded(plan.batches)
                    self._observer.folded(self._cached.name, layer, plan.moments)
                    plan.settle()
                    committed = plan.layer.stamp
                    del plan, folds  # frees the batches before the pause
                    taken.clear()
                    await self._back_off(committed, contenders, losses)
                    return
                case Duplicates(receipts):
                    await self._settle_from_receipts(folds, receipts)
                case Conflict(found):
                    self._lost_race(deadline, found)
                    losses += 1
                    taken += self._take_folds()  # add updates that arrived meanwhile to the retried commit
                case Missing():
                    raise self._gone()

    async def _back_off(self, committed: Stamp, contenders: int | None, losses: int) -> None:
        """Back off after winning under contention, then reload: folding onto the old state would lose the next race."""
        commits = 0

        def commits_of_others() -> int:
            return commits

        for seconds in self._backoff.pauses(contenders, losses, commits_of_others):
            await self._runtime.sleep(seconds)
            self._cached.set(None)
            commits = (await self._cached.latest_known()).stamp.version - committed.version

    async def _refuse(self, waiting: Fold, error: Exception) -> None:
        """Fail a fold that the state refuses, unless its key has a receipt: the batch may have been folded before."""
        if waiting.token.from_caller:
            try:
                receipt = await self._calls.find(waiting.token, waiting.incarnation)
            except ReplacedError as replaced:
                settle(waiting, replaced)
                return
            if receipt is not None:
                settle(waiting, replay(waiting.token, await self._cached.fresh(), receipt))
                return
        if not isinstance(error, ProblemError):
            _log.error("a batch for layer %r cannot be folded", self._cached.name, exc_info=error)
        settle(waiting, error)

    async def _settle_from_receipts(self, folds: Iterable[Fold], receipts: Iterable[Receipt]) -> None:
        by_key = {receipt.key: receipt for receipt in receipts}
        layer = await self._cached.fresh()
        for waiting in folds:
            if receipt := by_key.get(waiting.token.key):
                settle(waiting, replay(waiting.token, layer, receipt))
            for key in waiting.members.keys() & by_key.keys():  # the member's key was used by another call meanwhile
                del waiting.members[key]

    async def _change(self, change: Change) -> None:
        deadline = self._calls.deadline()
        while True:
            layer = await self._cached.fresh()
            try:
                check_version(change.if_match, layer)
            except ProblemError:
                # The retry of a change that took effect fails its own precondition: look for its receipt first.
                try:
                    replayed = await self._settle_replay(change, layer)
                except ReplacedError:
                    continue
                if replayed:
                    return
                raise
            if change.incarnation not in (None, layer.stamp.incarnation):
                settle(change, ReplacedError())
                return
            state = change.apply(layer.state)
            new, keep = self._retention.next(self._runtime, layer, state, change.operation, frequent=change.frequent)
            receipt = change.token.receipt(new.stamp.version, new.state.num_batches_tracked)
            match await self._calls.commit("change", [change], layer.stamp, record(new), [receipt], deadline, keep):
                case Committed():
                    self._cached.set(new)
                    self._observer.changed(self._cached.name, layer, new)
                    settle(change, Done(new, receipt.version, receipt.batch, replayed=False))
                    return
                case Duplicates(receipts):
                    settle(change, replay(change.token, await self._cached.fresh(), receipts[0]))
                    return
                case Conflict():
                    self._lost_race(deadline)
                case Missing():
                    raise self._gone()

    async def _settle_replay(self, change: Change, layer: CommittedLayer) -> bool:
        """Complete a change whose key has a receipt; return whether it has one. Raises `ReplacedError`."""
        receipt = await self._calls.find(change.token, layer.stamp.incarnation) if change.token.from_caller else None
        if receipt is not None:
            settle(change, replay(change.token, await self._cached.fresh(), receipt))
        return receipt is not None

    async def _note(self, note: Note) -> None:
        deadline = self._calls.deadline()
        while True:
            layer = await self._cached.fresh()
            if layer.stamp.incarnation != note.incarnation:
                raise layer_not_found(self._cached.name)
            receipt = note.token.receipt(layer.stamp.version, layer.state.num_batches_tracked, note.payload)
            match await self._calls.commit("receipt", [note], layer.stamp, None, [receipt], deadline):
                case Committed():
                    settle(note, Done(layer, receipt.version, receipt.batch, replayed=False))
                    return
                case Duplicates(receipts):
                    settle(note, replay(note.token, layer, receipts[0]))
                    return
                case Conflict():
                    self._lost_race(deadline)
                case Missing():
                    raise self._gone()

    async def _delete(self, deletion: Deletion) -> None:
        deadline = self._calls.deadline()
        while True:
            layer = await self._cached.fresh()
            check_version(deletion.if_match, layer)
            try:
                outcome = await self._calls.delete(layer.stamp, deadline, with_pins=deletion.with_pins)
            finally:  # it may have taken effect, whatever is raised
                self._kept.forget()
            match outcome:
                case Committed():
                    self._cached.set(None)
                    settle(deletion, Done(layer, layer.stamp.version, layer.state.num_batches_tracked, replayed=False))
                    # Updates behind it in the queue look for the layer again: another process may have created it
                    # anew before they were called, while this process waited for the store's reply.
                    return
                case Pinned():
                    raise LayerPinned(
                        f"layer {self._cached.name!r} has pins; delete them first, or with the layer by ?pins=delete",
                        field="pins",
                        expected="delete",
                    )
                case Conflict():
                    self._lost_race(deadline)
                case Missing():
                    raise self._gone()

    def _lost_race(self, deadline: float, found: Record | None = None) -> None:
        """After a conflict, cache the record that won, or clear the cache. Raises `Overloaded` after the deadline."""
        self._cached.set(None if found is None else decode(found))
        if self._runtime.now() > deadline:
            raise Overloaded("too many processes change this layer at once; nothing was done", retry_after=1)

    def _gone(self) -> ProblemError:
        self._cached.set(None)
        return layer_not_found(self._cached.name)


def _settle_all(queued: Iterable[Queued], error: Exception) -> None:
    for waiting in queued:
        settle(waiting, error)
