"""What one commit of folds will write, and what each of their callers will be told once it is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from batchnorm_client.wire.errors import ProblemError

from ..engine.running_statistics import fold, fold_many
from ..engine.state import LayerState
from ..runtime import Runtime
from ..store.base import Receipt, Record
from .records import CommittedLayer, record
from .updates import Done, Fold, ReplacedError, replay, settle


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One commit of folds.

    Attributes:
        layer: the layer after the commit.
        record: what to write; None when tracking is off, so that nothing but receipts changes.
        folds: the folds in their order, each with `num_batches_tracked` after it.
        twins: folds whose key is that of one of `folds`.
        refused: folds that this state does not take, each with the reason. They may have been folded before.
    """

    layer: CommittedLayer
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
            if self.record is not None or waiting.token.from_caller
        ] + [
            Receipt(key, fingerprint, self.layer.stamp.version, batch)
            for waiting, batch in self.folds
            for key, fingerprint in waiting.members.items()
        ]

    def settle(self) -> None:
        """Tell every caller that it is written; a twin is told as a repeat is."""
        version = self.layer.stamp.version
        for waiting, batch in self.folds:
            settle(waiting, Done(self.layer, version, batch, replayed=False))
        if self.twins:
            first = {waiting.token.key: self._receipt(waiting, batch) for waiting, batch in self.folds}
            for twin in self.twins:
                settle(twin, replay(twin.token, self.layer, first[twin.token.key]))

    def _receipt(self, waiting: Fold, batch: int) -> Receipt:
        return waiting.token.receipt(self.layer.stamp.version, batch, waiting.source.payload)


async def make_plan(runtime: Runtime, layer: CommittedLayer, waiting: Sequence[Fold]) -> Plan:
    """Fold what waits onto `layer`, in order; what is refused is left out."""
    there = [one for one in waiting if one.incarnation == layer.stamp.incarnation]
    for one in waiting:
        if one.incarnation != layer.stamp.incarnation:
            settle(one, ReplacedError())
    bug: Exception | None = None
    if len({one.token.key for one in there}) == len(there):
        try:
            return await _all(runtime, layer, there)
        except ProblemError:
            pass
        except Exception as error:
            bug = error
    # One by one, because a fold that fails must not keep the others from being folded.
    plan = await _each(runtime, layer, there)
    if bug is not None and not plan.refused:
        raise bug  # none of them is to blame: it is in folding them together, and must not pass for a slow success
    return plan


async def _all(runtime: Runtime, layer: CommittedLayer, waiting: Sequence[Fold]) -> Plan:
    """The plan where no key comes twice and nothing is refused. Raises for the first that is."""
    for one in waiting:
        await _under(layer, one)
    state = fold_many(layer.state, [one.source.moments for one in waiting])
    first = layer.state.num_batches_tracked
    step = 1 if layer.state.tracks else 0
    return _plan(runtime, layer, state, [(one, first + step * n) for n, one in enumerate(waiting, 1)])


async def _each(runtime: Runtime, layer: CommittedLayer, waiting: Sequence[Fold]) -> Plan:
    """The same, one by one, with twins, and with what is refused left out."""
    state = layer.state
    folds: list[tuple[Fold, int]] = []
    twins: list[Fold] = []
    refused: list[tuple[Fold, Exception]] = []
    keys: set[bytes] = set()
    for one in waiting:
        if one.token.key in keys:
            twins.append(one)
            continue
        try:
            await _under(layer, one)
            state = fold(state, one.source.moments)
        except Exception as error:
            refused.append((one, error))
            continue
        keys.add(one.token.key)
        folds.append((one, state.num_batches_tracked))
    return _plan(runtime, layer, state, folds, twins, refused)


async def _under(layer: CommittedLayer, one: Fold) -> None:
    if not layer.state.normalizes_like(one.source.basis):  # folds change nothing of what that asks for
        await one.source.under(layer.state)


def _plan(
    runtime: Runtime,
    layer: CommittedLayer,
    state: LayerState,
    folds: Iterable[tuple[Fold, int]],
    twins: Iterable[Fold] = (),
    refused: Iterable[tuple[Fold, Exception]] = (),
) -> Plan:
    changed = state is not layer.state
    after = layer.next(runtime, state) if changed else layer
    return Plan(after, record(after) if changed else None, tuple(folds), tuple(twins), tuple(refused))
