"""What concurrent callers saw of one layer, and whether one layer could have done that: a checker of histories."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple


class Event(NamedTuple):
    """A call and its answer. `began` and `ended` count all beginnings and endings, in the order they happened in."""

    kind: Literal["train", "eval"]
    began: int
    ended: int
    version: int
    batch: int


def faults(history: Iterable[Event]) -> list[str]:
    """Why no single layer, changed by one call after the other, can have given these answers; empty if one can.

    All trains of the layer that were acknowledged must be in the history, and none may be unanswered.
    """
    events = list(history)
    trains = sorted((event for event in events if event.kind == "train"), key=lambda event: event.batch)
    evals = [event for event in events if event.kind == "eval"]
    return [*_order_of_trains(trains), *_snapshots(trains, evals), *_real_time(events)]


def _order_of_trains(trains: Sequence[Event]) -> Iterable[str]:
    batches = [event.batch for event in trains]
    if batches != list(range(1, len(trains) + 1)):
        yield f"batch numbers have a gap or a repeat: {batches}"
    for earlier, later in pairwise(trains):
        if later.version < earlier.version:
            yield f"versions do not follow the batch numbers: {earlier}, {later}"


def _snapshots(trains: Sequence[Event], evals: Sequence[Event]) -> Iterable[str]:
    versions = [event.version for event in trains]
    for event in evals:
        position = bisect_right(versions, event.version)
        if event.batch != (trains[position - 1].batch if position else 0):
            yield f"no commit left this state: {event}"


def _real_time(events: Sequence[Event]) -> Iterable[str]:
    """A call sees everything that was answered before it began: no older version, and a train a later batch."""
    for event in events:
        before = [other for other in events if other.ended < event.began]
        if any(other.version > event.version for other in before):
            yield f"stale: {event} came after an answer with a later version"
        if event.kind == "train" and any(other.batch >= event.batch for other in before):
            yield f"folded before a batch that was acknowledged earlier: {event}"
