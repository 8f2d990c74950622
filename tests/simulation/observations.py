"""Checks followers: a part of the checker (`oracle.py`).

1. Each batch that was observed is folded at most once into an incarnation of the layer; one whose `observe` raised an
   error is never folded.
2. A batch that the follower no longer counts as unsent is folded, or its frame was refused. So after a `flush` or
   `close` that returned, all are; and a process that is killed loses at most what was unsent.
3. What is refused is told: the errors of later calls say how many batches are not counted.
4. A `flush` that raises an error which says that the outcome is known was right.
5. `eval` used a state that was the newest within the last `max_staleness` seconds; `observe` such a state and all own
   batches that are not in it, each once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from batchnorm_client.wire.errors import TimedOut
from batchnorm_service.store.base import Record
from simulation.faults import Faults
from simulation.followers import FollowerProcess
from simulation.operations import Operation
from simulation.oracle import folded, receipt_key
from simulation.state import State, normalized, read

if TYPE_CHECKING:
    from simulation.store import Server

PATIENCE = 5.0
"""Seconds within which each call of a follower succeeds in a world in which nothing goes wrong."""

_GIVEN_UP = re.compile(r"(\d+) observed batches of layer .* are given up")
_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


class _Fold(NamedTuple):
    """A commit that folded a frame."""

    at: float
    incarnation: int


def findings(processes: list[FollowerProcess], server: Server, faults: Faults) -> Iterator[str]:
    """What broke a promise."""
    folds: dict[tuple[str, bytes], list[_Fold]] = {}
    for applied in server.log:
        for receipt in applied.receipts:
            assert applied.after is not None
            fold = _Fold(applied.at, applied.after.stamp.incarnation)
            folds.setdefault((applied.name, receipt.key), []).append(fold)
    for process in processes:
        yield from _Checker(process, server, folds).findings()
        if faults.are_none and process.options["timeout"] >= PATIENCE:
            yield from (f"{one}: {one.error!r}" for one in process.operations if one.error is not None)


class _Checker:
    def __init__(self, process: FollowerProcess, server: Server, folds: dict[tuple[str, bytes], list[_Fold]]) -> None:
        self._process = process
        self._server = server
        self._folds = {key: folds.get((process.layer, receipt_key(key)), []) for key in process.frames}
        self._keys: dict[Operation, list[str]] = {}
        for key, frame in process.frames.items():
            for row in frame.rows:
                self._keys.setdefault(row, []).append(key)

    def findings(self) -> Iterator[str]:
        yield from self._process.findings
        for row, keys in self._keys.items():
            incarnations = [fold.incarnation for key in keys for fold in self._folds[key]]
            if len(set(incarnations)) != len(incarnations):
                yield f"{row}: it was folded twice"
            if incarnations and not row.acknowledged:
                yield f"{row}: it was folded all the same"
        for at, operations, unsent in self._process.unsent:
            observed = self._process.observed(operations)
            for row in observed[: len(observed) - unsent]:
                if not self._settled(row, at):
                    yield f"{row}: said at {at:.4f} to be folded, and was not; {unsent} were unsent"
            if unsent > self._process.options["max_unsent"]:
                yield f"at {at:.4f}: {unsent} batches were kept"
        for number, one in enumerate(self._process.operations):
            if why := self._contradicts(one, number):
                yield f"{one}: {why}"

    def _settled(self, row: Operation, at: float) -> bool:
        """Whether a batch was folded by then, or refused."""
        return any(
            self._process.frames[key].refused <= at or any(fold.at <= at for fold in self._folds[key])
            for key in self._keys.get(row, ())
        )

    def _contradicts(self, one: Operation, number: int) -> str | None:
        match one.kind:
            case "follower.eval" if one.acknowledged:
                if not any(self._shows(one, read(record.data)) for record, _ in self._newest(one)):
                    return "no state that was the newest lately is what it used"
            case "follower.observe" if one.acknowledged:
                if not any(self._shows(one, self._with_own(*newest, number)) for newest in self._newest(one)):
                    return "no state that was the newest lately, with all own batches, is what it used"
            case "follower.flush" | "follower.close" if one.acknowledged:
                return self._not_flushed(one, number)
            case "follower.flush" | "follower.close" if isinstance(one.error, TimedOut):
                if not one.error.outcome_unknown:
                    return self._known(one, number)
        return None

    def _not_flushed(self, one: Operation, number: int) -> str | None:
        unsent = [unsent for _, operations, unsent in self._process.unsent if operations == number + 1]
        if unsent[0]:
            return f"it returned, and {unsent[0]} batches were unsent"
        frames = self._process.frames.values()
        refused = sum(len(frame.rows) for frame in frames if frame.refused <= one.ended)
        notes = [
            note
            for each in self._process.operations[:number]
            if each.error is not None
            for note in getattr(each.error, "__notes__", ())
        ]
        told = sum(int(found[1]) for note in notes if (found := _GIVEN_UP.fullmatch(note)))
        return None if told == refused else f"{refused} batches were refused, and errors spoke of {told}"

    def _known(self, one: Operation, number: int) -> str | None:
        """What was unsent is not folded if a call said that its outcome is known."""
        unsent = next(unsent for _, operations, unsent in self._process.unsent if operations == number + 1)
        observed = self._process.observed(number)
        for row in observed[len(observed) - unsent :]:
            if any(fold.at <= one.ended for key in self._keys.get(row, ()) for fold in self._folds[key]):
                return "it said that the outcome is known, and a batch was folded"
        return None

    def _newest(self, one: Operation) -> Iterator[tuple[Record, float]]:
        """Each record that was the newest while an operation ran, or not longer before than allowed, and since when."""
        limit = self._process.options["max_staleness"]
        since = 0.0 if limit is None else one.began - limit
        for each in reversed(self._server.history.get(self._process.layer, [])):
            if each.record is not None and each.since <= one.ended and since <= each.until:
                yield each.record, each.since

    def _with_own(self, record: Record, since: float, number: int) -> State:
        """A state with the batches folded in that were observed by the end of an operation and are not in it."""
        versions = self._process.operations[number].result.versions
        batches = []
        for row in self._process.observed(number + 1):
            sent = next((key for key in self._keys.get(row, ()) if key in versions), None)
            if sent is None or not self._is_in(record, since, sent, versions[sent]):
                batches.append(row.arguments["batch"])
        return reduce(folded, batches, read(record.data))

    def _is_in(self, record: Record, since: float, key: str, version: int | None) -> bool:
        """Whether a frame is in a state, according to the response to it or, if there was none, to the log."""
        if version is not None:
            return version <= record.stamp.version
        return any(fold.at <= since and fold.incarnation == record.stamp.incarnation for fold in self._folds[key])

    @staticmethod
    def _shows(one: Operation, state: State) -> bool:
        mean, var = state.tensors["running_mean"], state.tensors["running_var"]
        expected = normalized(one.arguments["batch"], mean, var, state)
        return np.allclose(one.result.output, expected, **_TOLERANCE)
