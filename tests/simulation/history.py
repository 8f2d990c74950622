"""Checks kept states, pins and rollbacks: a part of the checker (`oracle.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from batchnorm_client.wire.errors import LayerNotFound, VersionNotFound
from batchnorm_service.store.base import Record
from simulation.operations import Operation
from simulation.state import digest, read, shows

if TYPE_CHECKING:
    from simulation.store import Server


def findings(operations: list[Operation], server: Server, length: int, *, requests_come_twice: bool) -> Iterator[str]:
    """What broke a promise about kept states.

    Args:
        operations: what clients saw.
        server: with its log, its table at the end, and the times in which layers had pins.
        length: how many states of a layer are kept without a pin.
        requests_come_twice: a copy of a request may take effect after its caller was answered.
    """
    for name in server.history:
        yield from _kept(name, server, length)
    for one in operations:
        unpins = [other for other in operations if other.kind == "unpin"]
        if not requests_come_twice:
            unpins = [other for other in unpins if other.ended >= one.began]
        if why := _contradicts(one, unpins, server):
            yield f"{one}: {why}"


def versions(server: Server, name: str, tag: str) -> set[int]:
    """The versions that a tag has stood for."""
    return {each.versions[tag] for each in server.pinned.get(name, ()) if tag in each.versions}


def _kept(name: str, server: Server, length: int) -> Iterator[str]:
    """What is kept at the end was committed, and the states before the last changes are kept."""
    present = server.table._records.get(name)
    if present is None:
        return
    incarnation = present.stamp.incarnation
    kept = server.table._kept.get(incarnation, {})
    committed = {record.stamp: record.data for record in records(server, name)}
    for version, record in kept.items():
        if committed.get(record.stamp) != record.data:
            yield f"{name}: version {version} is kept, and was never committed"
    pinned = set(server.pins(name).values())
    if missing := pinned - kept.keys():
        yield f"{name}: versions {sorted(missing)} are pinned and not kept"
    for applied in server.log:
        before, after = applied.before, applied.after
        if applied.name != name or before is None or after is None or after is before:
            continue
        if before.stamp.incarnation != incarnation or not _must_keep(before, after):
            continue
        version = before.stamp.version
        if version not in kept and sum(each > version for each in kept) < length:
            yield f"{name}: version {version} was changed and is not kept, of {sorted(kept)}"


def _must_keep(before: Record, after: Record) -> bool:
    """Whether the change is one of those before which a state is always kept: not a batch, not only weight and bias."""
    old, new = read(before.data), read(after.data)
    return new.operation in ("reset", "replace", "rollback") or old.config != new.config


def _contradicts(one: Operation, unpins: list[Operation], server: Server) -> str | None:  # noqa: PLR0911 - a case for each kind
    if isinstance(one.error, VersionNotFound):
        tag = one.arguments.get("at", one.arguments.get("to", one.arguments.get("tag")))
        if isinstance(tag, str) and all(tag in each for each in _between(one, server)):
            return "there was such a pin all the time"
        return None
    if not one.acknowledged or isinstance(one.error, LayerNotFound):
        return None
    match one.kind:
        case "pin":
            return _wrong_pin(one, unpins, server)
        case "eval_at":
            return _misread(one, server)
        case "history":
            for state in one.result:
                if state.digest not in _digests(server, one.layer, state.version):
                    return f"version {state.version} never had the digest {state.digest}"
    return None


def _wrong_pin(one: Operation, unpins: list[Operation], server: Server) -> str | None:
    """The pin was made, has the digest of its state, and stands until somebody asks to delete it."""
    tag, version = one.result.tag, one.result.version
    if one.result.digest not in _digests(server, one.layer, version):
        return "told another digest than that of the state"
    if not any(each.get(tag) == version for each in _between(one, server)):
        return "acknowledged, and yet there was no such pin"
    present = server.table._records.get(one.layer)
    if present is None or version not in {r.stamp.version for r in records(server, one.layer, present)}:
        return None  # its layer was deleted
    if any((other.layer, other.arguments["tag"]) == (one.layer, tag) for other in unpins):
        return None
    return None if server.pins(one.layer).get(tag) == version else "acknowledged, and yet it is lost"


def _misread(one: Operation, server: Server) -> str | None:
    """A read of a kept state returned that state."""
    at, version = one.arguments["at"], one.result.version
    if isinstance(at, int):
        if version != at:
            return f"returned version {version}"
    elif not any(each.get(at) == version for each in _between(one, server)):
        return f"returned version {version}, which the tag did not stand for"
    for record in records(server, one.layer):
        if record.stamp.version == version and digest(record.data) == one.result.digest:
            return None if shows(one, read(record.data)) else "the output is not that of its state"
    return f"version {version} never had the digest {one.result.digest}"


def _between(one: Operation, server: Server) -> list[Mapping[str, int]]:
    """The pins that the layer had at some time while an operation ran."""
    known = server.pinned.get(one.layer, [])
    found = [each.versions for each in known if each.since <= one.ended and one.began <= each.until]
    return found or [{}]


def records(server: Server, name: str, of: Record | None = None) -> list[Record]:
    """All records that a layer ever had; only those of one incarnation."""
    known = (each.record for each in server.history.get(name, ()))
    return [
        record
        for record in known
        if record is not None and (of is None or record.stamp.incarnation == of.stamp.incarnation)
    ]


def _digests(server: Server, name: str, version: int) -> set[str]:
    return {digest(record.data) for record in records(server, name) if record.stamp.version == version}
