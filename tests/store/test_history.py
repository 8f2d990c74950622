"""Kept records and pins, in every store."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest

from batchnorm_service.store.base import (
    Committed,
    Conflict,
    Duplicates,
    Full,
    Missing,
    NotKept,
    Pin,
    Pinned,
    Record,
    Stamp,
    Store,
    Unchanged,
)
from store.harness import Table, after, created, loaded, receipt

pytestmark = pytest.mark.anyio

MANY = 100  # of pins, where their number does not matter


async def replaced(store: Store, old: Record, data: bytes, keep: int = 0, *, name: str = "a") -> Record:
    """Commit the record that follows `old`."""
    new = after(old, data)
    assert await store.commit(name, old.stamp, new, [receipt()], keep) == Committed()
    return new


async def series(store: Store, count: int, keep: int, *, name: str = "a") -> list[Record]:
    """A new layer and `count` commits: all its records, oldest first."""
    records = [await created(store, name)]
    for number in range(count):
        records.append(await replaced(store, records[-1], b"%d" % number, keep, name=name))
    return records


def stamps(*records: Record) -> tuple[Stamp, ...]:
    return tuple(record.stamp for record in records)


# ---------------------------------------------------------------------------------------------------- kept records


async def test_a_name_that_was_never_created_has_no_history(store: Store) -> None:
    assert await store.kept("a") == Missing()
    assert await store.load_kept("a", 1) == Missing()
    assert await store.load_kept("a", "tag") == Missing()
    assert await store.pins("a") == Missing()
    assert await store.pin("a", Stamp(1, 1, 1), "tag", b"", MANY) == Missing()
    assert await store.unpin("a", 1, "tag", 1) == Missing()
    assert await store.import_history("a", 1, [Record(Stamp(1, 1, 1), b"")], [Pin("tag", 1, b"")]) == Missing()
    assert await store.kept("a") == Missing()


async def test_a_new_record_has_no_kept_ones_but_is_found_by_its_version(store: Store) -> None:
    record = await created(store, "a")
    assert await store.kept("a") == ()
    assert await store.pins("a") == ()
    assert await store.load_kept("a", record.stamp.version) == record
    assert await store.load_kept("a", record.stamp.version, record.stamp) == Unchanged()
    assert await store.load_kept("a", record.stamp.version + 1) == NotKept()
    assert await store.load_kept("a", "tag") == NotKept()


async def test_a_commit_keeps_the_record_that_it_replaces_and_no_other(store: Store) -> None:
    first = await created(store, "a", b"first \x00\xff")
    other = await created(store, "b")
    second = await replaced(store, first, b"second", keep=5)
    third = await replaced(store, second, b"third")
    fourth = await replaced(store, third, b"fourth", keep=5)
    assert await store.load("a") == fourth
    assert await store.kept("a") == stamps(third, first)
    assert await store.load_kept("a", first.stamp.version) == first
    assert await store.load_kept("a", second.stamp.version) == NotKept()
    assert await store.load_kept("a", third.stamp.version) == third
    assert await store.load_kept("a", fourth.stamp.version) == fourth
    assert await store.kept("b") == ()
    assert await store.load_kept("b", other.stamp.version) == other


async def test_a_commit_that_writes_no_record_keeps_none(store: Store) -> None:
    record = await created(store, "a")
    used = receipt()
    assert await store.commit("a", record.stamp, None, [used], 5) == Committed()
    new = after(record, b"new")
    assert await store.commit("a", record.stamp, new, [used], 5) == Duplicates((used,))
    wrong = record.stamp._replace(commit_id=record.stamp.commit_id ^ 1)
    assert await store.commit("a", wrong, new, [receipt()], 5) == Conflict()
    assert await store.commit("a", wrong._replace(incarnation=1), new, [], 5) == Conflict()
    assert await store.commit("b", record.stamp, new, [receipt()], 5) == Missing()
    assert await store.kept("a") == ()
    assert await store.load("a") == record
    assert await store.commit("a", record.stamp, new, [receipt()], 5) == Committed()
    assert await store.commit("a", record.stamp, after(record, b"late"), [receipt()], 5) == Conflict()
    assert await store.kept("a") == stamps(record)


async def test_commits_of_many_layers_at_once_keep_what_each_says(store: Store) -> None:
    records = [await created(store, f"n{number}", b"%d" % number) for number in range(20)]
    for _ in range(2):
        news = [after(record, record.data + b"+") for record in records]
        calls = zip(range(20), records, news, strict=True)
        assert (
            await asyncio.gather(
                *(store.commit(f"n{number}", old.stamp, new, [receipt()], number % 3) for number, old, new in calls)
            )
            == [Committed()] * 20
        )
        before, records = records, news
    for number in range(20):
        kept = await store.kept(f"n{number}")
        assert isinstance(kept, tuple)
        assert len(kept) == number % 3
        if kept:
            assert kept[0] == before[number].stamp
            assert await store.load_kept(f"n{number}", kept[0].version) == before[number]


async def test_only_the_newest_are_kept(store: Store) -> None:
    records = await series(store, 30, keep=4)
    assert await store.kept("a") == stamps(*records[-2:-6:-1])
    for record in records[:-5]:
        assert await store.load_kept("a", record.stamp.version) == NotKept()
    for record in records[-5:]:
        assert await store.load_kept("a", record.stamp.version) == record
    newest = await replaced(store, records[-1], b"fewer", keep=2)
    assert await store.kept("a") == stamps(*records[-1:-3:-1])
    await replaced(store, newest, b"none")
    assert await store.kept("a") == stamps(*records[-1:-3:-1]), "a commit that keeps nothing removes nothing"


async def test_versions_are_ordered_as_numbers(store: Store) -> None:
    """Across byte boundaries, and beyond the 53 bits of a floating-point number."""
    record = await created(store, "a")
    versions = [250, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**53, 2**53 + 1, 2**53 + 2, 2**63 - 2, 2**63 - 1]
    records = [record]
    for version in versions:
        new = Record(records[-1].stamp._replace(version=version), b"%d" % version)
        assert await store.commit("a", records[-1].stamp, new, [], 7) == Committed()
        records.append(new)
    assert await store.kept("a") == stamps(*records[-2:-9:-1])
    assert await store.load_kept("a", 2**53 + 1) == records[9]


async def test_a_kept_record_is_unchanged_only_for_the_very_stamp(store: Store) -> None:
    first, second = await series(store, 1, keep=1)
    assert await store.load_kept("a", first.stamp.version, first.stamp) == Unchanged()
    assert await store.load_kept("a", first.stamp.version, second.stamp) == first
    for wrong in (
        first.stamp._replace(incarnation=first.stamp.incarnation ^ 1),
        first.stamp._replace(commit_id=first.stamp.commit_id ^ 1),
    ):
        assert await store.load_kept("a", first.stamp.version, wrong) == first


async def test_large_records_are_kept_whole(store: Store) -> None:
    large = [secrets.token_bytes(3_000_000) for _ in range(3)]
    first = await created(store, "a", large[0])
    second = await replaced(store, first, large[1], keep=2)
    third = await replaced(store, second, large[2], keep=2)
    assert await store.load_kept("a", first.stamp.version) == first
    assert await store.pin("a", third.stamp, "newest", b"", MANY) == Committed()
    assert await store.load_kept("a", "newest") == third
    assert await store.load_kept("a", second.stamp.version) == second


# ------------------------------------------------------------------------------------------------------------ pins


async def test_a_pinned_record_is_found_by_tag_and_version(store: Store) -> None:
    first, second = await series(store, 1, keep=1)
    assert await store.pin("a", first.stamp, "old", b"\x00 data", MANY) == Committed()
    assert await store.pin("a", second.stamp, "new", b"", MANY) == Committed()
    assert await store.pins("a") == (Pin("new", 2, b""), Pin("old", 1, b"\x00 data"))
    assert await store.load_kept("a", "old") == first
    assert await store.load_kept("a", "old", first.stamp) == Unchanged()
    assert await store.load_kept("a", "old", second.stamp) == first
    assert await store.load_kept("a", "new") == second
    assert await store.load_kept("a", "other") == NotKept()
    assert await store.load("a") == second, "the record stays as it is"


async def test_a_pin_of_the_newest_keeps_a_copy(store: Store) -> None:
    record = await created(store, "a", b"pinned")
    assert await store.pin("a", record.stamp, "tag", b"", MANY) == Committed()
    assert await store.kept("a") == stamps(record)
    newest = await replaced(store, record, b"next")
    assert await store.load_kept("a", "tag") == record
    assert await store.load_kept("a", record.stamp.version) == record
    assert await store.kept("a") == stamps(record)
    assert await store.load("a") == newest
    again = await replaced(store, newest, b"kept again", keep=1)
    assert await store.kept("a") == stamps(newest, record), "a pinned record is not counted"
    assert await store.load("a") == again


async def test_a_pinned_newest_record_that_is_kept_by_a_commit_is_there_once(store: Store) -> None:
    record = await created(store, "a", b"pinned")
    assert await store.pin("a", record.stamp, "tag", b"", MANY) == Committed()
    await replaced(store, record, b"next", keep=3)
    assert await store.kept("a") == stamps(record)
    assert await store.load_kept("a", "tag") == record


@pytest.mark.slow
async def test_a_pin_survives_a_thousand_commits(store: Store) -> None:
    records = await series(store, 3, keep=5)
    assert await store.pin("a", records[1].stamp, "tag", b"data", MANY) == Committed()
    newest = records[-1]
    for number in range(1000):
        newest = await replaced(store, newest, b"%d" % number, keep=2)
    assert await store.load_kept("a", "tag") == records[1]
    assert await store.pins("a") == (Pin("tag", records[1].stamp.version, b"data"),)
    kept = await store.kept("a")
    assert isinstance(kept, tuple)
    assert [stamp.version for stamp in kept] == [newest.stamp.version - 1, newest.stamp.version - 2, 2]


@pytest.mark.parametrize("which", [0, 1], ids=["kept", "newest"])
async def test_only_the_record_with_the_very_stamp_is_pinned(store: Store, which: int) -> None:
    records = await series(store, 1, keep=1)
    stamp = records[which].stamp
    other = stamp._replace(commit_id=stamp.commit_id ^ 1)
    assert await store.pin("a", other, "tag", b"", MANY) == NotKept()
    assert await store.pin("a", stamp._replace(version=99), "tag", b"", MANY) == NotKept()
    assert await store.pin("a", stamp._replace(incarnation=stamp.incarnation ^ 1), "tag", b"", MANY) == Missing()
    assert await store.pin("b", stamp, "tag", b"", MANY) == Missing()
    assert await store.pins("a") == ()
    assert await store.pin("a", stamp, "tag", b"", MANY) == Committed()


async def test_a_record_that_is_not_kept_any_more_cannot_be_pinned(store: Store) -> None:
    first, _, third = await series(store, 2, keep=1)
    assert await store.pin("a", first.stamp, "tag", b"", MANY) == NotKept()
    assert await store.pins("a") == ()
    assert await store.load("a") == third


async def test_a_tag_that_is_taken_answers_with_its_pin(store: Store) -> None:
    first, second = await series(store, 1, keep=1)
    pin = Pin("tag", first.stamp.version, b"data")
    assert await store.pin("a", first.stamp, "tag", b"data", 1) == Committed()
    assert await store.pin("a", first.stamp, "tag", b"data", 1) == Pinned(pin), "a repeat, though no more fit"
    assert await store.pin("a", first.stamp, "tag", b"other", MANY) == Pinned(pin)
    assert await store.pin("a", second.stamp, "tag", b"data", MANY) == Pinned(pin)
    assert await store.pin("a", second.stamp._replace(version=99), "tag", b"data", MANY) == Pinned(pin)
    assert await store.pins("a") == (pin,)
    assert await store.load_kept("a", "tag") == first


async def test_no_more_pins_than_the_limit(store: Store) -> None:
    first, second = await series(store, 1, keep=1)
    assert await store.pin("a", second.stamp, "none", b"", 0) == Full()
    assert await store.kept("a") == stamps(first), "nothing was written"
    assert await store.pin("a", first.stamp, "one", b"", 2) == Committed()
    assert await store.pin("a", first.stamp, "two", b"", 2) == Committed()
    assert await store.pin("a", second.stamp, "three", b"", 2) == Full()
    assert await store.pin("a", second.stamp._replace(version=99), "three", b"", 2) == NotKept()
    assert await store.unpin("a", first.stamp.incarnation, "one", 1) == Committed()
    assert await store.pin("a", second.stamp, "three", b"", 2) == Committed()


async def test_pins_are_listed_in_order_of_their_bytes(store: Store) -> None:
    record = await created(store, "a")
    tags = ["Z", "a", "a.", "a-b", "a_", "é", "ﬀ", "\U0001f600", "zz", "0x", "version", "size"]
    for tag in tags:
        assert await store.pin("a", record.stamp, tag, tag.encode(), MANY) == Committed()
    pins = await store.pins("a")
    assert pins == tuple(Pin(tag, 1, tag.encode()) for tag in sorted(tags, key=str.encode))
    for tag in tags:
        assert await store.load_kept("a", tag) == record


async def test_unpinned_records_are_trimmed(store: Store) -> None:
    records = await series(store, 6, keep=3)
    one, two = records[3].stamp, records[4].stamp
    assert await store.pin("a", one, "one", b"", MANY) == Committed()
    assert await store.pin("a", one, "again", b"", MANY) == Committed()
    assert await store.pin("a", two, "two", b"", MANY) == Committed()
    newest = records[-1]
    for number in range(3):
        newest = await replaced(store, newest, b"%d" % number, keep=2)
    kept = (newest.stamp.version - 1, newest.stamp.version - 2)
    assert await store.unpin("a", one.incarnation, "one", 2) == Committed()
    assert await store.load_kept("a", "one") == NotKept()
    assert await store.load_kept("a", "again") == records[3], "another pin has it"
    assert await store.unpin("a", one.incarnation, "again", 2) == Committed()
    assert await store.load_kept("a", one.version) == NotKept()
    assert await store.unpin("a", one.incarnation, "again", 2) == NotKept()
    assert await store.unpin("a", one.incarnation ^ 1, "two", 2) == Missing()
    assert await store.unpin("b", one.incarnation, "two", 2) == Missing()
    assert await store.pins("a") == (Pin("two", two.version, b""),)
    assert await store.unpin("a", one.incarnation, "two", 3) == Committed()
    told = await store.kept("a")
    assert isinstance(told, tuple)
    assert tuple(stamp.version for stamp in told) == (*kept, two.version), "it is one of the three newest"
    assert await store.load("a") == newest


async def test_unpin_without_a_history_removes_all_that_is_kept(store: Store) -> None:
    first, second = await series(store, 1, keep=1)
    assert await store.pin("a", second.stamp, "tag", b"", MANY) == Committed()
    assert await store.unpin("a", first.stamp.incarnation, "tag", 0) == Committed()
    assert await store.kept("a") == ()
    assert await store.load_kept("a", second.stamp.version) == second
    assert await store.load_kept("a", first.stamp.version) == NotKept()


async def test_of_many_pins_of_one_tag_one_wins(store: Store) -> None:
    records = await series(store, 9, keep=9)
    told = await asyncio.gather(
        *(store.pin("a", record.stamp, "tag", b"%d" % n, MANY) for n, record in enumerate(records))
    )
    assert told.count(Committed()) == 1
    winner = told.index(Committed())
    pin = Pin("tag", records[winner].stamp.version, b"%d" % winner)
    assert [each for each in told if each != Committed()] == [Pinned(pin)] * 9
    assert await store.pins("a") == (pin,)
    assert await store.load_kept("a", "tag") == records[winner]


async def test_the_limit_holds_among_concurrent_pins(store: Store) -> None:
    record = await created(store, "a")
    told = await asyncio.gather(*(store.pin("a", record.stamp, f"t{n}", b"", 5) for n in range(20)))
    assert (told.count(Committed()), told.count(Full())) == (5, 15)
    pins = await store.pins("a")
    assert isinstance(pins, tuple)
    assert len(pins) == 5


async def test_a_pin_and_a_commit_that_follows_take_effect_in_order(store: Store) -> None:
    record = await created(store, "a")
    new = after(record, b"new")
    told: list[Any] = await asyncio.gather(
        store.pin("a", record.stamp, "tag", b"", MANY),
        store.commit("a", record.stamp, new, [receipt()], 3),
        store.load_kept("a", "tag"),
        store.pin("a", new.stamp, "new", b"", MANY),
        store.pins("a"),
    )
    assert told == [Committed(), Committed(), record, Committed(), (Pin("new", 2, b""), Pin("tag", 1, b""))]
    assert await store.kept("a") == stamps(new, record)


# ----------------------------------------------------------------------------------------------------- end of a layer


async def test_a_record_with_pins_is_deleted_only_with_them(store: Store) -> None:
    first, second = await series(store, 1, keep=1)
    assert await store.pin("a", first.stamp, "tag", b"", MANY) == Committed()
    assert await store.delete("a", first.stamp) == Conflict(), "which precedes Pinned"
    assert await store.delete("a", first.stamp, with_pins=True) == Conflict()
    assert await store.delete("a", second.stamp) == Pinned()
    assert await store.load("a") == second
    assert await store.load_kept("a", "tag") == first
    assert await store.delete("a", second.stamp, with_pins=True) == Committed()
    assert await store.pins("a") == Missing()
    assert await store.delete("a", second.stamp) == Missing()


async def test_a_record_without_pins_is_deleted_with_its_history(store: Store) -> None:
    first, second = await series(store, 1, keep=1)
    assert await store.pin("a", first.stamp, "tag", b"", MANY) == Committed()
    assert await store.unpin("a", first.stamp.incarnation, "tag", 1) == Committed()
    assert await store.delete("a", second.stamp) == Committed()
    assert await store.kept("a") == Missing()


async def test_a_layer_that_is_created_again_has_nothing_of_the_old_one(store: Store) -> None:
    old = await series(store, 3, keep=3)
    others = await series(store, 1, keep=1, name="b")
    assert await store.pin("a", old[1].stamp, "tag", b"", MANY) == Committed()
    assert await store.pin("b", others[0].stamp, "tag", b"", MANY) == Committed()
    assert await store.delete("a", old[-1].stamp, with_pins=True) == Committed()
    new = await created(store, "a")
    assert await store.kept("a") == ()
    assert await store.pins("a") == ()
    assert await store.load_kept("a", "tag") == NotKept()
    for record in old:
        assert await store.load_kept("a", record.stamp.version) == NotKept()
    assert await store.pin("a", old[1].stamp, "tag", b"", MANY) == Missing()
    assert await store.unpin("a", old[1].stamp.incarnation, "tag", 1) == Missing()
    assert await store.import_history("a", old[1].stamp.incarnation, old[:1], []) == Missing()
    assert await store.delete("a", new.stamp) == Committed(), "it has no pins"
    assert await store.kept("b") == stamps(others[0])
    assert await store.load_kept("b", "tag") == others[0]


async def test_a_restart_keeps_all(table: Table) -> None:
    store = table.store()
    await store.open()
    records = await series(store, 5, keep=3)
    assert await store.pin("a", records[-1].stamp, "new", b"data", MANY) == Committed()
    assert await store.pin("a", records[3].stamp, "old", b"", MANY) == Committed()
    await store.close()
    store = table.store()
    await store.open()
    try:
        assert await store.kept("a") == stamps(*records[-1:-5:-1])
        assert await store.pins("a") == (Pin("new", 6, b"data"), Pin("old", 4, b""))
        assert await store.load_kept("a", "old") == records[3]
        assert await store.load_kept("a", 3) == records[2]
    finally:
        await store.close()


# ---------------------------------------------------------------------------------------------------------- transfer


async def test_an_imported_history_is_one_of_the_record_s_own(store: Store) -> None:
    newest = await created(store, "a", b"newest")
    newest, old = Record(newest.stamp._replace(version=9), newest.data), newest
    assert await store.commit("a", old.stamp, newest, []) == Committed()
    incarnation = newest.stamp.incarnation
    elsewhere = [Record(Stamp(1, version, version + 40), b"%d" % version * 5) for version in (3, 5, 7)]
    pins = [Pin("three", 3, b"data"), Pin("newest", 9, b"")]
    for _ in range(2):  # it can be repeated
        assert await store.import_history("a", incarnation, elsewhere, pins) == Committed()
        own = [Record(record.stamp._replace(incarnation=incarnation), record.data) for record in elsewhere]
        assert await store.kept("a") == stamps(newest, *reversed(own))
        assert await store.pins("a") == (Pin("newest", 9, b""), Pin("three", 3, b"data"))
        assert await store.load_kept("a", "three") == own[0]
        assert await store.load_kept("a", 5) == own[1]
        assert await store.load_kept("a", "newest") == newest
        assert await store.load("a") == newest
    assert await store.import_history("a", incarnation ^ 1, elsewhere, pins) == Missing()
    await replaced(store, newest, b"next", keep=1)
    assert await store.kept("a") == stamps(newest, own[2], own[0]), "7 is the newest without a pin"


async def test_an_imported_history_replaces_what_is_there(store: Store) -> None:
    first, second, third = await series(store, 2, keep=2)
    assert await store.pin("a", first.stamp, "tag", b"mine", MANY) == Committed()
    theirs = Record(second.stamp._replace(commit_id=second.stamp.commit_id ^ 1), b"theirs")
    pin = Pin("tag", second.stamp.version, b"theirs")
    assert await store.import_history("a", first.stamp.incarnation, [theirs], [pin]) == Committed()
    assert await store.kept("a") == stamps(theirs, first)
    assert await store.load_kept("a", 2) == theirs
    assert await store.pins("a") == (pin,)
    assert await store.load_kept("a", "tag") == theirs
    assert await store.load("a") == await loaded(store, "a") == third


async def test_the_newest_record_is_pinned_whatever_its_stamp_is(store: Store) -> None:
    """A pin of the newest record must not wait until nobody commits."""
    assert await store.pin("a", None, "tag", b"", MANY) == Missing()
    first = await created(store, "a", b"first")
    second = after(first, b"second")
    assert await store.commit("a", first.stamp, second, []) == Committed()
    assert _pinned(await store.pin("a", None, "tag", b"data", MANY)) == second
    assert await store.pin("a", None, "tag", b"other", MANY) == Pinned(Pin("tag", second.stamp.version, b"data"))
    assert await store.pin("a", None, "full", b"", 1) == Full()
    third = after(second, b"third")
    assert await store.commit("a", second.stamp, third, []) == Committed()
    assert await store.load_kept("a", "tag") == second
    assert await store.pin("a", None, "newer", b"", MANY) == Committed()
    assert await store.load_kept("a", "newer") == third
    assert _pinned(await store.pin("a", second.stamp, "older", b"", MANY)) == second


def _pinned(outcome: object) -> Record | None:
    """The record that a pin says it keeps: it may be unpinned before it could be read."""
    assert isinstance(outcome, Committed)
    return outcome.pinned
