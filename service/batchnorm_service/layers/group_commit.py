"""Plans a group commit: the record and receipts that one commit writes, and the result of each fold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from batchnorm_client.wire.errors import ProblemError

from ..engine.moments_stack import MomentsStack
from ..engine.posted import Posted
from ..engine.running_statistics import fold, fold_many
from ..engine.state import LayerState
from ..runtime import Runtime
from ..store.base import Receipt, Record
from .compute import ComputeExecutor
from .records import CommittedLayer, record
from .retention import Retention
from .updates import Done, Fold, ReplacedError, replay, settle


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The content of one group commit.

    Attributes:
        layer: the layer after the commit.
        record: the new record; None when tracking is off, so that only receipts are written.
        folds: the folds in order, each with `num_batches_tracked` after it.
        repeats: folds with the same key as one of `folds`.
        refused: folds that raised an exception, each with that exception. They may have been folded before.
        keep: the argument of the store's commit.
    """

    layer: CommittedLayer
    record: Record | None
    folds: tuple[tuple[Fold, int], ...]
    repeats: tuple[Fold, ...]
    refused: tuple[tuple[Fold, Exception], ...]
    keep: int

    @property
    def batches(self) -> int:
        """How many batches are folded: a fold may be of a stack."""
        return sum(waiting.source.moments.batches for waiting, _ in self.folds)

    @property
    def moments(self) -> list[Posted]:
        """What is folded, in order."""
        return [waiting.source.moments for waiting, _ in self.folds]

    @property
    def updates(self) -> list[Fold]:
        """The folds alone."""
        return [waiting for waiting, _ in self.folds]

    @property
    def receipts(self) -> list[Receipt]:
        """A receipt for each fold, and for each key of a group's members.

        A fold without a caller's key has none if the record does not change: nobody could look it up.
        """
        return [
            self._receipt(waiting, batch)
            for waiting, batch in self.folds
            if self.record is not None or waiting.token.from_caller
        ] + [
            Receipt(key, fingerprint, self.layer.stamp.version, batch)
            for waiting, batch in self.folds
            for key, fingerprint in waiting.members.items()
        ]

    def settle(self) -> None:
        """Complete the futures of all folds, after the commit; those of repeats as replayed."""
        version = self.layer.stamp.version
        for waiting, batch in self.folds:
            settle(waiting, Done(self.layer, version, batch, replayed=False))
        if self.repeats:
            first = {waiting.token.key: self._receipt(waiting, batch) for waiting, batch in self.folds}
            for repeat in self.repeats:
                settle(repeat, replay(repeat.token, self.layer, first[repeat.token.key]))

    def _receipt(self, waiting: Fold, batch: int) -> Receipt:
        return waiting.token.receipt(self.layer.stamp.version, batch, waiting.source.payload)


async def make_plan(
    executor: ComputeExecutor,
    runtime: Runtime,
    retention: Retention,
    layer: CommittedLayer,
    waiting: Sequence[Fold],
) -> Plan:
    """Fold the waiting folds onto `layer`, in order. Those of another incarnation fail with `ReplacedError`."""
    current = [one for one in waiting if one.incarnation == layer.stamp.incarnation]
    for one in waiting:
        if one.incarnation != layer.stamp.incarnation:
            settle(one, ReplacedError())
    bug: Exception | None = None
    if len({one.token.key for one in current}) == len(current):
        try:
            return await _plan_together(executor, runtime, retention, layer, current)
        except ProblemError:
            pass
        except Exception as error:
            bug = error
    # One by one, because a fold that is refused must not keep the others from being folded.
    plan = await _plan_one_by_one(executor, runtime, retention, layer, current)
    if bug is not None and not plan.refused:
        raise bug  # a bug in `fold_many`: succeeding more slowly would hide it
    return plan


async def _plan_together(
    executor: ComputeExecutor,
    runtime: Runtime,
    retention: Retention,
    layer: CommittedLayer,
    waiting: Sequence[Fold],
) -> Plan:
    """The plan if keys are unique and no fold is refused; raises for the first that is."""
    for one in waiting:
        await _compute(layer, one)
    state, batch = layer.state, layer.state.num_batches_tracked
    folds: list[tuple[Fold, int]] = []
    together: list[Posted] = []  # moments that were not folded yet
    for one in waiting:
        together.append(one.source.moments)
        batch += one.source.moments.batches if state.tracks else 0
        folds.append((one, batch))
        if one.source.needs_state:
            state, together = await executor.run_codec(_cost(*together), fold_many, state, together), []
            one.source.folded(state)
    state = await executor.run_codec(_cost(*together), fold_many, state, together)
    return _plan(runtime, retention, layer, state, folds)


def _cost(*folds: Posted) -> int:
    """The argument of `run_codec`: a large stack is folded in a thread, which often holds the GIL, as codecs do."""
    return sum(moments.cost for moments in folds if isinstance(moments, MomentsStack))


async def _plan_one_by_one(
    executor: ComputeExecutor,
    runtime: Runtime,
    retention: Retention,
    layer: CommittedLayer,
    waiting: Sequence[Fold],
) -> Plan:
    """The plan with repeated keys and refused folds taken out."""
    state = layer.state
    folds: list[tuple[Fold, int]] = []
    repeats: list[Fold] = []
    refused: list[tuple[Fold, Exception]] = []
    keys: set[bytes] = set()
    for one in waiting:
        if one.token.key in keys:
            repeats.append(one)
            continue
        try:
            await _compute(layer, one)
            state = await executor.run_codec(_cost(one.source.moments), fold, state, one.source.moments)
            one.source.folded(state)
        except Exception as error:
            refused.append((one, error))
            continue
        keys.add(one.token.key)
        folds.append((one, state.num_batches_tracked))
    return _plan(runtime, retention, layer, state, folds, repeats, refused)


async def _compute(layer: CommittedLayer, one: Fold) -> None:
    if not layer.state.normalizes_like(one.source.basis):  # folds before it in this commit cannot change that
        await one.source.compute(layer.state)


def _plan(
    runtime: Runtime,
    retention: Retention,
    layer: CommittedLayer,
    state: LayerState,
    folds: Iterable[tuple[Fold, int]],
    repeats: Iterable[Fold] = (),
    refused: Iterable[tuple[Fold, Exception]] = (),
) -> Plan:
    after, keep = layer, 0
    if changed := state is not layer.state:
        after, keep = retention.next(runtime, layer, state, "train", frequent=True)
    return Plan(after, record(after) if changed else None, tuple(folds), tuple(repeats), tuple(refused), keep)
