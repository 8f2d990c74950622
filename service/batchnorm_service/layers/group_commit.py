"""What one commit of folds will write, and what each of their callers will be told once it is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from batchnorm_client.wire.errors import ProblemError

from ..engine.accumulators.moving import fold, fold_all
from ..engine.state import LayerState
from ..store.base import Receipt, Record
from .records import Held, record
from .updates import Done, Fold, ReplacedError, replay, settle


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One commit of folds.

    Attributes:
        held: the layer after the commit.
        record: what to write; None when tracking is off, so that nothing but receipts changes.
        folds: the folds in their order, each with `num_batches_tracked` after it.
        twins: folds whose key is that of one of `folds`.
        refused: folds that this state does not take, each with the reason. They may have been folded before.
    """

    held: Held
    record: Record | None
    folds: tuple[tuple[Fold, int], ...]
    twins: tuple[Fold, ...]
    refused: tuple[tuple[Fold, Exception], ...]

    @property
    def receipts(self) -> list[Receipt]:
        """A receipt for each fold, and for each key of a group's members.

        There is none for a fold that changes nothing and whose caller gave no key.
        """
        return [
            self._receipt(waiting, batch)
            for waiting, batch in self.folds
            if self.record is not None or waiting.ticket.from_caller
        ] + [
            Receipt(key, fingerprint, self.held.stamp.version, batch)
            for waiting, batch in self.folds
            for key, fingerprint in waiting.members.items()
        ]

    def settle(self) -> None:
        """Tell every caller that it is written; a twin is told as a repeat is."""
        version = self.held.stamp.version
        for waiting, batch in self.folds:
            settle(waiting, Done(self.held, version, batch, replayed=False))
        if self.twins:
            first = {waiting.ticket.key: self._receipt(waiting, batch) for waiting, batch in self.folds}
            for twin in self.twins:
                settle(twin, replay(twin.ticket, self.held, first[twin.ticket.key]))

    def _receipt(self, waiting: Fold, batch: int) -> Receipt:
        return waiting.ticket.receipt(self.held.stamp.version, batch, waiting.work.payload)


async def make_plan(held: Held, waiting: Sequence[Fold]) -> Plan:
    """Fold what waits onto `held`, in order; what is refused is left out."""
    there = [one for one in waiting if one.incarnation == held.stamp.incarnation]
    for one in waiting:
        if one.incarnation != held.stamp.incarnation:
            settle(one, ReplacedError())
    bug: Exception | None = None
    if len({one.ticket.key for one in there}) == len(there):
        try:
            return await _all(held, there)
        except ProblemError:
            pass
        except Exception as error:
            bug = error
    # One by one, because a fold that fails must not keep the others from being folded.
    plan = await _each(held, there)
    if bug is not None and not plan.refused:
        raise bug  # none of them is to blame: it is in folding them together, and must not pass for a slow success
    return plan


async def _all(held: Held, waiting: Sequence[Fold]) -> Plan:
    """The plan where no key comes twice and nothing is refused. Raises for the first that is."""
    for one in waiting:
        await _under(held, one)
    state = fold_all(held.state, [one.work.moments for one in waiting])
    first = held.state.num_batches_tracked
    step = 1 if held.state.tracks else 0
    return _plan(held, state, [(one, first + step * n) for n, one in enumerate(waiting, 1)])


async def _each(held: Held, waiting: Sequence[Fold]) -> Plan:
    """The same, one by one, with twins, and with what is refused left out."""
    state = held.state
    folds: list[tuple[Fold, int]] = []
    twins: list[Fold] = []
    refused: list[tuple[Fold, Exception]] = []
    keys: set[bytes] = set()
    for one in waiting:
        if one.ticket.key in keys:
            twins.append(one)
            continue
        try:
            await _under(held, one)
            state = fold(state, one.work.moments)
        except Exception as error:
            refused.append((one, error))
            continue
        keys.add(one.ticket.key)
        folds.append((one, state.num_batches_tracked))
    return _plan(held, state, folds, twins, refused)


async def _under(held: Held, one: Fold) -> None:
    if not held.state.normalizes_like(one.work.basis):  # folds change nothing of what that asks for
        await one.work.under(held.state)


def _plan(
    held: Held,
    state: LayerState,
    folds: Iterable[tuple[Fold, int]],
    twins: Iterable[Fold] = (),
    refused: Iterable[tuple[Fold, Exception]] = (),
) -> Plan:
    changed = state is not held.state
    after = held.next(state) if changed else held
    return Plan(after, record(after) if changed else None, tuple(folds), tuple(twins), tuple(refused))
