"""Checks calls that read the states of several layers and wait for others: a part of the checker (`oracle.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from batchnorm_client import LayerStates
from batchnorm_client.wire.errors import LayerNotFound
from batchnorm_service.store.base import Record
from simulation.faults import Faults
from simulation.operations import Operation
from simulation.state import read

if TYPE_CHECKING:
    from simulation.store import Server

SLACK = 1.0
"""Seconds within which a wait ends after another state, in a world in which nothing goes wrong."""


def findings(operations: list[Operation], server: Server, faults: Faults) -> Iterator[str]:
    """What broke a promise: each state was the newest of its layer while the call ran, and no wait missed another."""
    for one in operations:
        if one.kind == "wait" and (why := _contradicts(one, server, faults)):
            yield f"{one}: {why}"


def _contradicts(one: Operation, server: Server, faults: Faults) -> str | None:
    names = one.arguments["names"]
    if isinstance(one.error, LayerNotFound):
        gone = any(None in _newest(server, name, one.began, one.ended) for name in names)
        return None if gone else "there were layers all the time"
    if not one.acknowledged:
        return None
    known, found, ended = one.result
    for states in (known, found):
        for name in names:
            if not any(_shows(states, name, record) for record in _newest(server, name, one.began, one.ended)):
                return f"no state of {name} that was the newest meanwhile is what it returned"
    if faults.are_none:
        for name in names:
            last = _newest(server, name, ended - SLACK, ended)
            if not any(_shows(known, name, record) for record in last):
                return f"it waited, although {name} had another state for {SLACK} s"
    return None


def _newest(server: Server, name: str, since: float, until: float) -> list[Record | None]:
    known = server.history.get(name)
    return [None] if known is None else [one.record for one in known if one.since <= until and since <= one.until]


def _shows(states: LayerStates, name: str, record: Record | None) -> bool:
    if record is None or record.stamp.version != states.versions[name]:
        return False
    tensors = read(record.data).tensors
    return all(np.array_equal(array, tensors[key]) for key, array in states.tensors[name].items())
