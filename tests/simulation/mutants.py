"""Faults that are planted to prove that the checker finds them: each takes the place of a function of the product.

Every one is a mistake that was made once, here or elsewhere: see the names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from typing import Any

import pytest

from batchnorm_client.async_follower import AsyncFollower
from batchnorm_client.core import calls, retries
from batchnorm_client.core.followed import Followed, Frame
from batchnorm_client.wire.errors import BatchNormError
from batchnorm_service.engine.moments_stack import MomentsStack
from batchnorm_service.layers import group_commit, groups, moments_source, update_queue, updates
from batchnorm_service.layers.cache import LayerCache
from batchnorm_service.layers.cached_state import CachedState
from batchnorm_service.layers.group_commit import Plan
from batchnorm_service.layers.kept_states import KeptStates
from batchnorm_service.layers.retention import Retention
from batchnorm_service.layers.shared_check import SharedCheck
from batchnorm_service.layers.states import States
from batchnorm_service.layers.store_calls import StoreCalls
from batchnorm_service.layers.update_queue import UpdateQueue
from batchnorm_service.layers.watches import Watch, Watches
from batchnorm_service.store.base import Committed, Conflict, Duplicates, Record, Stamp, StoreError
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.store.sqlite.thread import SqliteThread
from simulation import world
from simulation.store import Server

Patch = pytest.MonkeyPatch


def receipts_are_not_written(patch: Patch) -> None:
    patch.setattr(Plan, "receipts", property(lambda _: []))


def answered_before_the_commit(patch: Patch) -> None:
    make_plan = update_queue.make_plan

    async def early(*arguments: Any) -> Plan:
        plan = await make_plan(*arguments)
        plan.settle()
        return plan

    patch.setattr(update_queue, "make_plan", early)


def the_cache_is_believed_without_a_check(patch: Patch) -> None:
    patch.setattr(CachedState, "trusted", property(lambda self: self.layer))


def a_layer_in_use_is_evicted(patch: Patch) -> None:
    def evict(self: LayerCache, new: Any) -> None:
        while len(self._entries) > self._options.resident_layers:
            name = next(name for name in self._entries if self._entries[name] is not new)
            del self._entries[name]

    patch.setattr(LayerCache, "_evict", evict)


def a_duplicate_is_folded_again(patch: Patch) -> None:
    commit = MemoryStore.commit

    async def forgetful(self: MemoryStore, *arguments: Any) -> Any:
        outcome = await commit(self, *arguments)
        if isinstance(outcome, Duplicates):
            patched, self._unexpired = self._unexpired, lambda *_: ()  # type: ignore[method-assign]
            outcome = await commit(self, *arguments)
            self._unexpired = patched  # type: ignore[method-assign]
        return outcome

    patch.setattr(MemoryStore, "commit", forgetful)


def receipts_expire_early(patch: Patch) -> None:
    patch.setattr(world, "RECEIPT_SECONDS", 0.05)


def a_retry_has_a_new_key(patch: Patch) -> None:
    pause = retries.Attempts.pause

    def renamed(self: Any, error: Any) -> float:
        wait = pause(self, error)
        headers = dict(self.request.headers)
        if "Idempotency-Key" in headers:
            headers["Idempotency-Key"] += "x"
            self.request = replace(self.request, headers=headers)
        return wait

    patch.setattr(retries.Attempts, "pause", renamed)


def an_unknown_outcome_is_taken_for_success(patch: Patch) -> None:
    async def hopeful(
        self: StoreCalls,
        update: Any,
        waiting: Any,
        expected: Any,
        new: Any,
        receipts: Any,
        deadline: float,
        keep: int = 0,
    ) -> Any:
        try:
            return await self._store.commit(self._cached.name, expected, new, receipts, keep)
        except StoreError:
            return Committed()

    patch.setattr(StoreCalls, "commit", hopeful)


def an_unknown_outcome_is_folded_anew(patch: Patch) -> None:
    async def commit(
        self: StoreCalls,
        update: Any,
        waiting: Any,
        expected: Any,
        new: Any,
        receipts: Any,
        deadline: float,
        keep: int = 0,
    ) -> Any:
        tries = 0
        while True:
            try:
                renewed = [one._replace(key=bytes([tries]) + one.key[1:]) for one in receipts] if tries else receipts
                found = await self._store.load(self._cached.name)
                expected = found.stamp if tries and isinstance(found, Record) else expected
                return await self._store.commit(self._cached.name, expected, new, renewed, keep)
            except StoreError as error:
                tries += 1
                await self._pause(0.01, deadline, error)

    patch.setattr(StoreCalls, "commit", commit)


def a_lost_race_overwrites_the_winner(patch: Patch) -> None:
    commit = MemoryStore.commit

    async def forced(self: MemoryStore, name: str, expected: Any, record: Any, receipts: Any, keep: int) -> Any:
        outcome = await commit(self, name, expected, record, receipts, keep)
        present = self._records.get(name)
        if isinstance(outcome, Conflict) and present and present.stamp.incarnation == expected.incarnation:
            return await commit(self, name, present.stamp, record, receipts, keep)
        return outcome

    patch.setattr(MemoryStore, "commit", forced)


async def _nothing(*_: Any) -> None: ...


class _VersionOnly(Stamp):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stamp) and self[:2] == other[:2]

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = Stamp.__hash__


def a_stamp_is_compared_by_its_version_alone(patch: Patch) -> None:
    """A failover may cause a version to be given a second time."""
    load, commit = MemoryStore.load, MemoryStore.commit

    async def loaded(self: MemoryStore, name: str, unless: Any = None) -> Any:
        return await load(self, name, None if unless is None else _VersionOnly(*unless))

    async def committed(self: MemoryStore, name: str, expected: Any, *arguments: Any) -> Any:
        return await commit(self, name, _VersionOnly(*expected), *arguments)

    patch.setattr(MemoryStore, "load", loaded)
    patch.setattr(MemoryStore, "commit", committed)


def a_new_weight_is_not_noticed(patch: Patch) -> None:
    patch.setattr(group_commit, "_compute", _nothing)

    async def stale(self: Any, _state: Any) -> Any:
        return self._step if self._step is not None else await output(self, _state)

    output = moments_source.BatchSource.output
    patch.setattr(moments_source.BatchSource, "output", stale)


def a_group_is_folded_once_by_each_member(patch: Patch) -> None:
    closed = count(1)

    async def close(self: Any, token: Any, status: Any, operation: Any) -> None:
        members = dict(status.members)
        whole = operation.merge([operation.unpack(part) for part in status.parts])
        renamed = token._replace(key=next(closed).to_bytes(16, "big"))
        for one in (renamed, token):
            await operation.close(
                one, whole, {}, lambda totals: groups.GroupResult(status.size, members, totals).pack()
            )
        await self._leave(token, operation, None)

    patch.setattr(groups.Groups, "_close", close)


def keys_are_not_compared_with_their_batches(patch: Patch) -> None:
    patch.setattr(updates, "refuse_reuse", lambda *_: None)


def waiting_folds_are_written_in_another_order(patch: Patch) -> None:
    together = group_commit._plan_together

    async def reversed_order(*arguments: Any) -> Plan:
        plan = await together(*arguments)
        batches = [batch for _, batch in plan.folds]
        return replace(plan, folds=tuple(zip([one for one, _ in reversed(plan.folds)], batches, strict=True)))

    patch.setattr(group_commit, "_plan_together", reversed_order)


def an_eval_shares_a_check_that_was_sent_before(patch: Patch) -> None:
    async def share(self: Any) -> Any:
        if self._running is None or self._running.done():
            self._running = self._runtime.create_task(self._check())
        return await asyncio.shield(self._running)

    patch.setattr(SharedCheck, "__call__", share)


def a_store_answers_before_it_is_durable(patch: Patch) -> None:
    apply = Server.apply

    async def hasty(self: Any, name: str, work: Any, receipts: Any = ()) -> Any:
        reply: Any = asyncio.get_running_loop().create_future()

        async def note(table: Any) -> Any:
            answer = await work(table)
            reply.set_result(answer)
            return answer

        task = self.process.spawn(apply(self, name, note, receipts))
        await asyncio.wait([task, reply], return_when=asyncio.FIRST_COMPLETED)
        return await reply

    patch.setattr(Server, "apply", hasty)


def a_thread_answers_before_its_transaction_is_durable(patch: Patch) -> None:
    group = SqliteThread._group

    def hasty(self: Any, runs: Any, connection: Any) -> Any:
        values = group(self, runs, connection)
        self._complete([(job.future, value) for job, value in zip(chain(*runs), values, strict=True)])
        return values

    patch.setattr(SqliteThread, "_group", hasty)


def a_failed_transaction_is_acknowledged(patch: Patch) -> None:
    def hopeful(self: Any, jobs: Any, _reason: Exception) -> None:
        self._complete([(job.future, Committed()) for job in jobs])

    patch.setattr(SqliteThread, "_fail", hopeful)


def a_pin_does_not_keep_its_state(patch: Patch) -> None:
    pin = MemoryStore.pin

    async def unkept(self: MemoryStore, *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as meanwhile:
            meanwhile.setattr(MemoryStore, "_keep", lambda *_: None)
            return await pin(self, *arguments)

    patch.setattr(MemoryStore, "pin", unkept)


def the_history_drops_pinned_states(patch: Patch) -> None:
    def trim(self: MemoryStore, incarnation: int, keep: int) -> None:
        kept = self._kept.get(incarnation, {})
        for version in sorted(kept, reverse=True)[keep:]:
            del kept[version]

    patch.setattr(MemoryStore, "_trim", trim)


def a_deleted_pin_is_served_from_memory(patch: Patch) -> None:
    patch.setattr(KeptStates, "forget", lambda _: None)


def the_state_before_a_reset_is_not_kept(patch: Patch) -> None:
    proceed = Retention.next

    def forgetful(self: Retention, *arguments: Any, **options: Any) -> Any:
        after, keep = proceed(self, *arguments, **options)
        return after, 0 if after.operation == "reset" else keep

    patch.setattr(Retention, "next", forgetful)


def a_rollback_leaves_the_counters(patch: Patch) -> None:
    submit = UpdateQueue.submit

    async def partly(self: UpdateQueue, queued: Any) -> Any:
        if getattr(queued, "operation", "") == "rollback":
            apply = queued.apply
            queued.apply = lambda old: apply(old)._replace(num_batches_tracked=old.num_batches_tracked)
        return await submit(self, queued)

    patch.setattr(UpdateQueue, "submit", partly)


def a_commit_wakes_no_wait(patch: Patch) -> None:
    patch.setattr(Watch, "changed", lambda self: None)


def a_replacement_is_made_of_the_state_that_was_read(patch: Patch) -> None:
    submit = UpdateQueue.submit

    async def early(self: UpdateQueue, queued: Any) -> Any:
        known = self._cached.layer
        if known is not None and getattr(queued, "operation", "") in ("update", "replace"):
            state = queued.apply(known.state)
            queued.apply = lambda _: state
        return await submit(self, queued)

    patch.setattr(UpdateQueue, "submit", early)


def the_versions_of_states_are_not_compared(patch: Patch) -> None:
    replace_many = States.replace_many
    patch.setattr(States, "replace_many", lambda self, tensors, *_: replace_many(self, tensors, {}, None))


class _Unnumbered:
    """A watch of which nobody sees that changes were reported."""

    changes = 0

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watch, name)


def a_commit_between_check_and_registration_is_missed(patch: Patch) -> None:
    use = Watches.use

    @contextmanager
    def unnumbered(self: Watches, selection: Any) -> Iterator[Any]:
        with use(self, selection) as watch:
            yield _Unnumbered(watch)

    patch.setattr(Watches, "use", unnumbered)


def a_frame_is_folded_in_part_after_a_lost_race(patch: Patch) -> None:
    fold_many, tried = group_commit.fold_many, list[Any]()

    def resumed(state: Any, folds: Any) -> Any:
        rest = [_without_its_first_row(one) if any(one is each for each in tried) else one for one in folds]
        tried.extend(folds)
        return fold_many(state, rest)

    patch.setattr(group_commit, "fold_many", resumed)


def _without_its_first_row(moments: Any) -> Any:
    if moments.batches == 1:
        return moments
    return MomentsStack(moments.counts[1:], moments.mean[1:], moments.var[1:])


def an_observation_sees_batches_that_were_folded_after_it(patch: Patch) -> None:
    settle = Plan.settle

    def late(self: Plan) -> None:
        for waiting, _ in self.folds:
            waiting.source.folded(self.layer.state)
        settle(self)

    patch.setattr(Plan, "settle", late)


def a_follower_goes_on_from_a_state_while_a_frame_is_in_doubt(patch: Patch) -> None:
    patch.setattr(Followed, "in_doubt", property(lambda _: False))


def a_frame_without_a_response_is_put_into_a_new_one(patch: Patch) -> None:
    async def once(self: AsyncFollower, followed: Followed, frame: Frame) -> None:
        request = calls.fold_moments(self.name, frame.stack, key=frame.key)
        try:
            result = await self._client._call(request, retries.Retry(attempts=1))
        except BatchNormError:
            followed._frames.remove(frame)
            followed._unsent[:0] = frame.batches
            followed.taken -= len(frame.batches)
            followed.oldest = self._runtime.now()
        else:
            followed.folded(frame, result.version)

    patch.setattr(AsyncFollower, "_deliver", once)


def a_flush_returns_when_all_is_sent(patch: Patch) -> None:
    take, folded = Followed.take, Followed.folded

    def taken(self: Followed, *arguments: Any) -> Frame:
        frame = take(self, *arguments)
        self.settled += len(frame.batches)
        return frame

    def counted(self: Followed, frame: Frame, version: int) -> None:
        self.settled -= len(frame.batches)
        folded(self, frame, version)

    patch.setattr(Followed, "take", taken)
    patch.setattr(Followed, "folded", counted)


def a_follower_uses_a_state_of_any_age(patch: Patch) -> None:
    patch.setattr(AsyncFollower, "_older_than_allowed", lambda *_: None)


def an_error_is_said_to_have_had_no_effect(patch: Patch) -> None:
    patch.setattr(retries, "may_have_taken_effect", lambda _: False)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    plant.__name__.replace("_", " "): plant
    for plant in (
        receipts_are_not_written,
        answered_before_the_commit,
        the_cache_is_believed_without_a_check,
        a_layer_in_use_is_evicted,
        a_duplicate_is_folded_again,
        receipts_expire_early,
        a_retry_has_a_new_key,
        an_unknown_outcome_is_taken_for_success,
        an_unknown_outcome_is_folded_anew,
        a_lost_race_overwrites_the_winner,
        a_stamp_is_compared_by_its_version_alone,
        a_new_weight_is_not_noticed,
        a_group_is_folded_once_by_each_member,
        keys_are_not_compared_with_their_batches,
        waiting_folds_are_written_in_another_order,
        an_eval_shares_a_check_that_was_sent_before,
        a_store_answers_before_it_is_durable,
        a_thread_answers_before_its_transaction_is_durable,
        a_failed_transaction_is_acknowledged,
        a_pin_does_not_keep_its_state,
        the_history_drops_pinned_states,
        a_deleted_pin_is_served_from_memory,
        the_state_before_a_reset_is_not_kept,
        a_rollback_leaves_the_counters,
        a_replacement_is_made_of_the_state_that_was_read,
        the_versions_of_states_are_not_compared,
        a_commit_wakes_no_wait,
        a_commit_between_check_and_registration_is_missed,
        a_frame_is_folded_in_part_after_a_lost_race,
        an_observation_sees_batches_that_were_folded_after_it,
        a_follower_goes_on_from_a_state_while_a_frame_is_in_doubt,
        a_frame_without_a_response_is_put_into_a_new_one,
        a_flush_returns_when_all_is_sent,
        a_follower_uses_a_state_of_any_age,
        an_error_is_said_to_have_had_no_effect,
    )
}
"""By what goes wrong."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The mutant of that name, as long as the context is open."""
    with pytest.MonkeyPatch.context() as patch:
        MUTANTS[name](patch)
        yield
