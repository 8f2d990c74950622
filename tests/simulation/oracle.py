"""The checker: could one layer, changed by one call after the other, have given these answers?

The store's log tells where each change took effect (its linearization point): a change that is in the log with its
receipts happened once, at that time; an operation without an answer may be there or not. So the history is
linearizable if

1. each change in the log is what some operation asked for, applied to the state before it (numpy, step by step);
2. no key is folded twice into one incarnation of a layer;
3. each acknowledged operation is in the log, between its beginning and its end, with the version and batch number that
   its caller was told, and each that was refused is not;
4. each read returned a state that was the newest at some time between its beginning and its end, with its numbers;
5. what is kept is what was committed; a pin stands from its acknowledgement until somebody asks to delete it, and a
   read of a tag returns the state that is pinned (`history.py`).

A write that a crash undid is not in the log: nobody may have been told that it took effect. A read may have seen it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from batchnorm_client.wire.errors import LayerNotFound
from batchnorm_service.store.base import Receipt, Record
from simulation import history
from simulation.operations import Operation
from simulation.state import State, normalized, read, shows

if TYPE_CHECKING:
    from simulation.store import Applied, Server

Vector = np.ndarray[Any, Any]
Batches = Vector | list[Vector]
"""A batch, or those of a frame."""
FOLDS = ("train", "fold_moments")
UNKEYED = ("create", "delete", "update", "load_state_dict")
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def receipt_key(key: str) -> bytes:
    """What a receipt is filed under: the digest of a caller's key, or of a group's name."""
    return blake2b(key.encode(), digest_size=16).digest()


def check(
    operations: list[Operation], server: Server, history_length: int, *, requests_come_twice: bool = False
) -> list[str]:
    """What broke a promise; empty if nothing did.

    Args:
        operations: what clients saw.
        server: with its log.
        history_length: how many states of a layer are kept without a pin.
        requests_come_twice: something on the way repeats requests, so that a refusal says nothing of the other copy.
    """
    checker = _Checker(operations, server, requests_come_twice)
    return [
        *checker.findings(),
        *history.findings(operations, server, history_length, requests_come_twice=requests_come_twice),
    ]


class _Checker:
    def __init__(self, operations: list[Operation], server: Server, requests_come_twice: bool) -> None:
        self._operations = operations
        self._requests_come_twice = requests_come_twice
        self._server = server
        self._by_key: dict[tuple[str, bytes], list[Operation]] = {}
        self._groups: dict[tuple[str, bytes], list[Operation]] = {}
        for one in operations:
            if one.kind != "wait" and (key := one.arguments.get("key")):
                self._by_key.setdefault((one.layer, receipt_key(key)), []).append(one)
            if group := one.arguments.get("group"):
                self._groups.setdefault((one.layer, receipt_key(f"group fold {group}")), []).append(one)
        self._places: dict[tuple[str, bytes], list[tuple[Applied, Receipt]]] = {}
        for applied in server.log:
            for receipt in applied.receipts:
                self._places.setdefault((applied.name, receipt.key), []).append((applied, receipt))

    def findings(self) -> Iterator[str]:
        """All faults."""
        yield from self._chains()
        yield from self._once()
        yield from self._one_batch()
        for applied in self._server.log:
            if why := self._explains_nothing(applied):
                yield f"at {applied.at:.4f} {applied.name}: {why}"
        for one in self._operations:
            if why := self._contradicts(one):
                yield f"{one}: {why}"

    # ------------------------------------------------------------------------------------------------ the log

    def _chains(self) -> Iterator[str]:
        """Each change was made to the newest state, and versions grow."""
        newest: dict[str, Record | None] = {}
        floor: dict[str, int] = {}
        for applied in self._server.log:
            before = newest.get(applied.name)
            if applied.before is not before:
                yield f"at {applied.at:.4f} {applied.name}: changed a state that was not the newest"
            if applied.after is not None and applied.after is not before:
                version = applied.after.stamp.version
                if version <= floor.get(applied.name, 0):
                    yield f"at {applied.at:.4f} {applied.name}: version {version} came before"
                floor[applied.name] = version
            newest[applied.name] = applied.after

    def _once(self) -> Iterator[str]:
        """No key is folded twice into one incarnation."""
        for (name, key), places in self._places.items():
            incarnations = [applied.before.stamp.incarnation for applied, _ in places if applied.before]
            if len(set(incarnations)) != len(incarnations):
                asked = self._by_key.get((name, key)) or self._groups.get((name, key))
                yield f"{name}: folded twice: {asked[0] if asked else key.hex()}"

    def _one_batch(self) -> Iterator[str]:
        """No two batches are told of one fold."""
        told: dict[tuple[str, str, int, int], Vector] = {}
        for one in self._operations:
            if one.kind == "train" and one.acknowledged:
                place = (one.layer, one.arguments["key"], one.result.version, one.result.num_batches_tracked)
                if told.setdefault(place, one.arguments["batch"]) is not one.arguments["batch"]:
                    yield f"{one}: another batch was folded under this key"

    def _explains_nothing(self, applied: Applied) -> str | None:
        """Why a change is not one that somebody asked for; None if it is."""
        if applied.after is None:
            return self._asked(applied, "delete")
        if applied.before is None:
            after = read(applied.after.data)
            fresh = after.batches == 0 and (after.tensors["running_mean"] == 0).all()
            return self._asked(applied, "create") if fresh else "a new layer is not in its initial state"
        before, after = read(applied.before.data), read(applied.after.data)
        folds = [receipt for receipt in applied.receipts if self._is_fold(applied.name, receipt.key)]
        if applied.after is applied.before and all((applied.name, receipt.key) in self._groups for receipt in folds):
            return None  # a group that waited in vain is closed
        if folds:
            return self._folds_differ(applied, before, after, folds)
        return self._change_differs(applied, before, after)

    def _is_fold(self, name: str, key: bytes) -> bool:
        operations = self._by_key.get((name, key), [])
        return (name, key) in self._groups or any(one.kind in FOLDS for one in operations)

    def _asked(self, applied: Applied, kind: str) -> str | None:
        asked = (one for one in self._operations if one.kind == kind and one.layer == applied.name)
        return None if any(one.began <= applied.at for one in asked) else f"nobody asked to {kind} it"

    def _folds_differ(self, applied: Applied, before: State, after: State, folds: list[Receipt]) -> str | None:
        name, number, members = applied.name, before.batches, set()
        possible = [before]  # several where one key was used for several batches
        for receipt in folds:
            if receipt.key in members:
                continue  # a group's member: folded with its group
            group = self._groups.get((name, receipt.key))
            candidates = group or self._by_key[name, receipt.key]
            if group:
                batches = {one.arguments["key"]: one.arguments["batch"] for one in group}
                if len(batches) != 2:
                    return f"a group was folded with {len(batches)} members"
                members |= {receipt_key(key) for key in batches}
                choices = [np.concatenate(list(batches.values()))]
            else:
                choices = self._sent(name, receipt.key)
            if not any(one.began <= applied.at for one in candidates):
                return "a batch was folded before anybody sent it"
            number += before.tracks * len(_rows(choices[0]))  # a key is used again for as many batches
            if (receipt.version, receipt.batch) != (applied.after.stamp.version, number):
                return f"a receipt says version {receipt.version}, batch {receipt.batch}, not {number}"
            possible = [folded(state, batch) for state in possible for batch in choices]
        if not before.tracks:
            return None if applied.after is applied.before else "a batch changed a layer whose tracking is off"
        differences = [_difference(state, after) for state in possible]
        return None if None in differences else differences[0]

    def _sent(self, name: str, key: bytes) -> list[Batches]:
        """What was sent under a key: several where it was used again."""
        sent = (one.arguments["batch"] for one in self._by_key[name, key] if "group" not in one.arguments)
        return list({id(batch): batch for batch in sent}.values())

    def _change_differs(self, applied: Applied, before: State, after: State) -> str | None:
        kinds = ("reset", "update", "load_state_dict", "rollback")
        keyed = [one for receipt in applied.receipts for one in self._by_key.get((applied.name, receipt.key), [])]
        asked = [one for one in keyed or self._operations if one.kind in kinds and one.layer == applied.name]
        for one in asked:
            if one.began <= applied.at and any(
                _difference(state, after) is None for state in self._results(applied, before, one)
            ):
                return None
        return f"no call asked for this change, of {len(asked)}"

    def _results(self, applied: Applied, before: State, one: Operation) -> Iterator[State]:
        """What a change may make of a state. A rollback to a tag may find any of the states that had it."""
        if not _expected(applied, one):
            return
        if one.kind != "rollback":
            yield _changed(before, one)
            return
        assert applied.before is not None
        to = one.arguments["to"]
        versions = {to} if isinstance(to, int) else history.versions(self._server, one.layer, to)
        for record in history.records(self._server, one.layer, applied.before):
            if record.stamp.version in versions:
                yield read(record.data)

    # ----------------------------------------------------------------------------------------- the operations

    def _contradicts(self, one: Operation) -> str | None:  # noqa: PLR0911 - a case for each kind
        """Why what a caller was told is not true; None if it is."""
        if one.kind == "wait" or one.kind.startswith("follower."):
            return None  # see `waits.py` and `observations.py`
        if isinstance(one.error, LayerNotFound):
            return None if any(record is None for record in self._between(one)) else "there was a layer all the time"
        if one.kind in ("eval", "inspect"):
            return self._misread(one) if one.acknowledged else None
        key = one.arguments.get("key")
        if one.kind == "pin":
            return None  # see `history.py`
        if key is None:
            return self._unmade(one) if one.acknowledged and one.kind in UNKEYED else None
        places = self._places.get((one.layer, receipt_key(key)), [])
        if one.refused:
            if self._requests_come_twice:
                return None
            alone = len(self._by_key[one.layer, receipt_key(key)]) == 1 and "group" not in one.arguments
            return "refused, and yet it took effect" if places and alone else None
        return self._misplaced(one, places) if one.acknowledged else None

    def _misplaced(self, one: Operation, places: list[tuple[Applied, Receipt]]) -> str | None:
        """An acknowledged operation with a key is in the log as its caller was told."""
        group = one.arguments.get("group")
        if group:
            places = self._places.get((one.layer, receipt_key(f"group fold {group}")), [])
        told = (one.result.version, one.result.num_batches_tracked)
        mine = [applied for applied, receipt in places if (receipt.version, receipt.batch) == told]
        if not places:
            return "acknowledged, and yet it is lost"
        if not mine:
            return f"told version and batch {told}, not {[(r.version, r.batch) for _, r in places]}"
        if mine[0].at > one.ended:
            return f"acknowledged before it was written, at {mine[0].at:.4f}"
        if one.kind == "train":
            batch = one.arguments["batch"]
            if group:
                shards = self._groups[one.layer, receipt_key(f"group fold {group}")]
                members = {each.arguments["key"]: each.arguments["batch"] for each in shards}
                batch = np.concatenate(list(members.values()))
            return self._wrong_output(one, batch, mine[0])
        return None

    def _wrong_output(self, one: Operation, batch: Vector, applied: Applied) -> str | None:
        """torch's own output, under the weight, bias and eps of the commit; of a shard, that of the whole batch."""
        if one.result.replayed:
            return None  # normalized with the weight and bias, or with the statistics, of today
        if one.arguments.get("normalize") == "running":
            return self._wrong_observation(one, applied)
        state = read(applied.after.data)
        weight, bias = (torch.from_numpy(state.tensors[name].copy()) for name in ("weight", "bias"))
        whole = torch.from_numpy(batch)
        output = torch.nn.functional.batch_norm(whole, None, None, weight, bias, True, 0.0, state.config["eps"])
        expected, mine = output.numpy(), one.arguments["batch"]
        if batch is not mine:
            expected = expected[(batch[:, None] == mine).all(2).any(1)]
            return None if np.allclose(one.result.output, expected, rtol=1e-3, atol=1e-3) else "the output is wrong"
        return None if np.array_equal(one.result.output, expected) else "the output is not torch's"

    def _wrong_observation(self, one: Operation, applied: Applied) -> str | None:
        """Normalized with the running statistics right after its own fold, not with those after the whole commit."""
        possible = [read(applied.before.data)] if applied.before else []
        for receipt in applied.receipts:
            group = self._groups.get((one.layer, receipt.key))
            whole = group and [np.concatenate([each.arguments["batch"] for each in _members(group)])]
            choices = whole or self._sent(one.layer, receipt.key)
            possible = [folded(state, batch) for state in possible for batch in choices]
            if receipt.key == receipt_key(one.arguments["key"]):
                break
        for state in possible:
            mean, var = state.tensors["running_mean"], state.tensors["running_var"]
            expected = normalized(one.arguments["batch"], mean, var, state)
            if np.allclose(one.result.output, expected, rtol=1e-3, atol=1e-3):
                return None
        return "it is not normalized with the statistics right after it"

    def _misread(self, one: Operation) -> str | None:
        """A read returned a state that was the newest while it ran."""
        told = (one.result.version, one.result.num_batches_tracked)
        for record in self._between(one):
            if record is not None and record.stamp.version == told[0]:
                state = read(record.data)
                if state.batches == told[1] and shows(one, state):
                    return None
        return f"no state that was the newest meanwhile is what it returned: version and batch {told}"

    def _unmade(self, one: Operation) -> str | None:
        """A change without a key is in the log while its call ran."""
        if one.kind == "create":
            return None if any(self._between(one)) else "there was no such layer"
        for applied in self._server.log:
            if applied.name == one.layer and one.began <= applied.at <= one.ended and _made(applied, one):
                return None
        gone = one.kind == "delete" and any(record is None for record in self._between(one))
        return None if gone or self._confirmed(one) else "acknowledged, and yet it is not in the log"

    def _confirmed(self, one: Operation) -> bool:
        """A client that asked whether its update took effect may have found that it made no difference."""
        return any(
            record is not None and _difference(_changed(read(record.data), one), read(record.data)) is None
            for record in self._between(one)
        )

    def _between(self, one: Operation) -> list[Record | None]:
        """Each record that was the newest at some time while an operation ran; None for no layer."""
        known = self._server.history.get(one.layer)
        if known is None:
            return [None]
        return [each.record for each in known if each.since <= one.ended and one.began <= each.until]


def _made(applied: Applied, one: Operation) -> bool:
    """Whether a write is what a change without a key asked for."""
    if one.kind == "delete" or applied.after is None:
        return one.kind == "delete" and applied.after is None
    if applied.before is None or not _expected(applied, one):
        return False
    return _difference(_changed(read(applied.before.data), one), read(applied.after.data)) is None


def _expected(applied: Applied, one: Operation) -> bool:
    """Whether a change was made to the version that its caller expected, if it gave one."""
    version = one.arguments.get("if_match") or one.arguments.get("versions", {}).get(one.layer)
    return version is None or (applied.before is not None and applied.before.stamp.version == version)


def _rows(batch: Batches) -> list[Vector]:
    """The batches of a frame, or the one batch."""
    return batch if isinstance(batch, list) else [batch]


def _members(group: list[Operation]) -> list[Operation]:
    """One call of each member of a group, which may have made several."""
    return list({one.arguments["key"]: one for one in group}.values())


def folded(state: State, batch: Batches) -> State:
    """running = (1 - m) * running + m * batch; or Chan's merge, in float64; a frame batch by batch."""
    if not state.tracks:
        return state
    if isinstance(batch, list):
        return reduce(folded, batch, state)
    wide = batch.astype(np.float64)
    count, mean, var = len(wide), wide.mean(0), wide.var(0)
    tensors, number, samples = dict(state.tensors), state.batches + 1, state.samples + count
    if state.config["statistics"] == "population":
        delta, m2 = mean - tensors["population_mean"], tensors["population_m2"]
        tensors["population_m2"] = m2 + var * count + delta**2 * (state.samples * count / samples)
        tensors["population_mean"] = tensors["population_mean"] + delta * (count / samples)
        tensors["samples_tracked"] = np.int64(samples)
        tensors["running_mean"] = tensors["population_mean"]
        tensors["running_var"] = tensors["population_m2"] / max(samples - 1, 1)
    else:
        momentum = state.config["momentum"] if state.config["momentum"] is not None else 1 / number
        for name, value in (("running_mean", mean), ("running_var", var * count / (count - 1))):
            tensors[name] = (1 - momentum) * tensors[name].astype(np.float64) + momentum * value
    tensors["num_batches_tracked"] = np.int64(number)
    return State(state.config, tensors, samples)


def _changed(state: State, one: Operation) -> State:
    """What a change makes of a state."""
    config, tensors, samples = dict(state.config), dict(state.tensors), state.samples
    match one.kind:
        case "update":
            for name, value in one.arguments["changes"].items():
                (tensors if name in ("weight", "bias") else config)[name] = value
        case "load_state_dict":
            tensors |= one.arguments["tensors"]
        case "reset":
            what = one.arguments["what"]
            if what in ("running_stats", "all") and config["track_running_stats"]:
                zero, samples = np.zeros_like(tensors["running_mean"], np.float64), 0
                tensors |= {"running_mean": zero, "running_var": zero + 1, "num_batches_tracked": np.int64(0)}
                if config["statistics"] == "population":
                    tensors |= {"population_mean": zero, "population_m2": zero, "samples_tracked": np.int64(0)}
            if what in ("parameters", "all"):
                tensors |= {"weight": np.ones_like(tensors["weight"]), "bias": np.zeros_like(tensors["bias"])}
    return State(config, tensors, samples)


def _difference(expected: State, found: State) -> str | None:
    """How two states differ; None if they are the same up to rounding."""
    if expected.config != found.config:
        return f"the config is {found.config}, not {expected.config}"
    if expected.tensors.keys() != found.tensors.keys():
        return f"it has {sorted(found.tensors)}, not {sorted(expected.tensors)}"
    for name, value in expected.tensors.items():
        if not np.allclose(value, found.tensors[name], **TOLERANCE):
            return f"{name} is {found.tensors[name]}, not {value}"
    return None if expected.samples == found.samples else f"samples are {found.samples}, not {expected.samples}"
