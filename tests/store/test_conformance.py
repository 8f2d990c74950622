"""What every store does (`batchnorm_service.store.base`), told by what it answers."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from batchnorm_service.runtime import RUNTIME
from batchnorm_service.store.base import (
    CONTENDER_SECONDS,
    HEAD_BYTES,
    Committed,
    Conflict,
    Duplicates,
    Exists,
    Full,
    Missing,
    Receipt,
    Record,
    Stamp,
    Store,
    StoreError,
    Unchanged,
)
from store.harness import LIMIT, RECEIPT_SECONDS, Table, after, created, loaded, receipt

pytestmark = pytest.mark.anyio


async def test_a_name_that_was_never_created_is_missing(store: Store) -> None:
    stamp = Stamp(1, 1, 1)
    assert await store.load("a") == Missing()
    assert await store.load("a", unless=stamp) == Missing()
    assert await store.commit("a", stamp, Record(stamp.next(RUNTIME.bits(63)), b""), [receipt()]) == Missing()
    assert await store.commit("a", stamp, None, [receipt()]) == Missing()
    assert await store.delete("a", stamp) == Missing()
    assert await store.list("", "", 10) == []
    await store.ping()


async def test_a_created_record_is_loaded_as_it_was_written(store: Store) -> None:
    record = await created(store, "a", b"\x00\xff data")
    assert record.data == b"\x00\xff data"
    assert await store.load("a") == record
    assert await created(store, "empty", b"") == await store.load("empty")


async def test_load_says_unchanged_only_for_the_very_stamp(store: Store) -> None:
    record = await created(store, "a")
    stamp = record.stamp
    assert await store.load("a", unless=stamp) == Unchanged()
    assert await store.load("a", unless=stamp._replace(incarnation=stamp.incarnation ^ 1)) == record
    assert await store.load("a", unless=stamp._replace(version=stamp.version + 1)) == record
    assert await store.load("a", unless=stamp._replace(commit_id=stamp.commit_id ^ 1)) == record


async def test_a_second_create_answers_with_the_record_that_is_there(store: Store) -> None:
    record = await created(store, "a", b"mine")
    assert await store.create("a", b"theirs", LIMIT) == Exists(record)
    assert await store.load("a") == record


async def test_of_many_creates_of_one_name_one_wins(store: Store) -> None:
    answers = await asyncio.gather(*(store.create("a", bytes([n]), LIMIT) for n in range(20)))
    (winner,) = [answer for answer in answers if isinstance(answer, Record)]
    assert [answer for answer in answers if answer != winner] == [Exists(winner)] * 19


async def test_a_full_store_refuses_new_names_until_one_is_deleted(store: Store) -> None:
    first = await created(store, "a")
    await created(store, "b")
    assert await store.create("c", b"", 2) == Full()
    assert await store.load("c") == Missing()
    assert await store.create("a", b"", 2) == Exists(first), "a name that is there is no new one"
    assert await store.delete("a", first.stamp) == Committed()
    assert isinstance(await store.create("c", b"", 2), Record)
    assert await store.create("d", b"", 2) == Full()
    assert isinstance(await store.create("d", b"", 3), Record)


async def test_the_limit_holds_among_concurrent_creates(store: Store) -> None:
    answers = await asyncio.gather(*(store.create(f"n{n}", b"", 5) for n in range(20)))
    assert sum(isinstance(answer, Record) for answer in answers) == 5
    assert len(await store.list("", "", 100)) == 5


async def test_stamps_are_63_bit_and_new_with_every_create(store: Store) -> None:
    stamps = [(await created(store, f"n{n}")).stamp for n in range(50)]
    assert all(0 <= number < 2**63 for stamp in stamps for number in stamp)
    assert len({stamp.incarnation for stamp in stamps}) == 50
    assert len({stamp.commit_id for stamp in stamps}) == 50
    largest = Stamp(2**63 - 1, 2**63 - 2, 2**63 - 1)
    record = await created(store, "a")
    assert await store.commit("a", record.stamp, Record(largest, b""), []) == Committed()
    assert (await loaded(store, "a")).stamp == largest


async def test_versions_of_a_name_never_repeat(store: Store) -> None:
    seen: list[int] = []
    for _ in range(3):
        record = await created(store, "a")
        seen.append(record.stamp.version)
        for _ in range(3):
            record, old = after(record, b"next"), record
            assert await store.commit("a", old.stamp, record, []) == Committed()
            seen.append(record.stamp.version)
        other = await created(store, "b")  # lower than what "a" had: deleting it must not lower the floor
        assert await store.delete("a", record.stamp) == Committed()
        assert await store.delete("b", other.stamp) == Committed()
    assert seen == sorted(set(seen))


async def test_a_commit_replaces_the_record_it_expects(store: Store) -> None:
    first = await created(store, "a")
    other = await created(store, "b")
    second = after(first, b"second")
    assert await store.commit("a", first.stamp, second, [receipt()]) == Committed()
    assert await store.load("a") == second
    assert await store.load("a", unless=first.stamp) == second
    assert await store.load("b") == other


async def test_a_conflict_writes_neither_record_nor_receipts(store: Store) -> None:
    first = await created(store, "a")
    second, third = after(first, b"second"), after(first, b"third")
    assert await store.commit("a", first.stamp, second, []) == Committed()
    late = receipt()
    assert await store.commit("a", first.stamp, third, [late]) == Conflict()
    assert await store.commit("a", first.stamp, None, [late]) == Conflict()
    assert await store.load("a") == second
    assert await store.commit("a", second.stamp, after(second, b""), [late]) == Committed(), "its key was not used"


@pytest.mark.parametrize("field", Stamp._fields)
async def test_a_stamp_that_differs_in_one_number_is_a_conflict(store: Store, field: str) -> None:
    record = await created(store, "a")
    wrong = record.stamp._replace(**{field: getattr(record.stamp, field) + 1})
    assert await store.commit("a", wrong, after(record, b"x"), []) == Conflict()
    assert await store.delete("a", wrong) == Conflict()
    assert await store.load("a") == record


async def test_duplicates_are_all_named_and_nothing_is_written(store: Store) -> None:
    first = await created(store, "a")
    used = [receipt(batch=n) for n in range(3)]
    second = after(first, b"second")
    assert await store.commit("a", first.stamp, second, used) == Committed()
    new = receipt()
    repeats = [used[2]._replace(fingerprint=bytes(16), version=99, batch=99), new, used[0]]
    answer = await store.commit("a", second.stamp, after(second, b"third"), repeats)
    assert isinstance(answer, Duplicates)
    assert sorted(answer.receipts) == sorted([used[0], used[2]]), "as they were first written"
    assert await store.load("a") == second
    third = after(second, b"third")
    assert await store.commit("a", second.stamp, third, [new]) == Committed(), "the new key was not used"


async def test_duplicates_come_before_a_conflict(store: Store) -> None:
    first = await created(store, "a")
    used = receipt()
    assert await store.commit("a", first.stamp, after(first, b"second"), [used]) == Committed()
    answer = await store.commit("a", first.stamp, after(first, b"other"), [used, receipt()])
    assert answer == Duplicates((used,)), "a repeat after a lost reply learns that it was applied"


@pytest.mark.parametrize("field", Stamp._fields)
async def test_duplicates_are_told_whatever_stamp_is_expected(store: Store, field: str) -> None:
    record = await created(store, "a")
    used = receipt()
    assert await store.commit("a", record.stamp, None, [used]) == Committed()
    nowhere = record.stamp._replace(**{field: -1})
    assert await store.commit("a", nowhere, None, [receipt(), used]) == Duplicates((used,))
    assert await store.commit("a", nowhere, None, [receipt()]) == Conflict()


async def test_missing_comes_before_duplicates(store: Store) -> None:
    first = await created(store, "a")
    used = receipt()
    assert await store.commit("a", first.stamp, None, [used]) == Committed()
    assert await store.delete("a", first.stamp) == Committed()
    assert await store.commit("a", first.stamp, None, [used]) == Missing()


async def test_receipts_without_a_record_keep_record_and_stamp(store: Store) -> None:
    record = await created(store, "a")
    used = receipt()
    assert await store.commit("a", record.stamp, None, [used]) == Committed()
    assert await store.load("a") == record
    assert await store.load("a", unless=record.stamp) == Unchanged()
    assert await store.commit("a", record.stamp, None, [used]) == Duplicates((used,))


async def test_many_receipts_in_one_commit(store: Store) -> None:
    record = await created(store, "a")
    many = [receipt(batch=n) for n in range(3000)]
    assert await store.commit("a", record.stamp, None, many) == Committed()
    answer = await store.commit("a", record.stamp, None, many)
    assert isinstance(answer, Duplicates)
    assert set(answer.receipts) == set(many)


async def test_a_receipt_counts_for_its_own_layer_only(store: Store) -> None:
    a, b = await created(store, "a"), await created(store, "b")
    used = receipt()
    assert await store.commit("a", a.stamp, None, [used]) == Committed()
    assert await store.commit("b", b.stamp, None, [used]) == Committed()


async def test_a_receipt_expires_and_its_key_can_be_used_again(table: Table, store: Store) -> None:
    record = await created(store, "a")
    old, other, replayed = receipt(), receipt(), receipt()
    assert await store.commit("a", record.stamp, None, [old, other, replayed]) == Committed()
    table.forward(RECEIPT_SECONDS - 2)
    # Not one of the others: a replay may renew its receipt.
    assert await store.commit("a", record.stamp, None, [replayed]) == Duplicates((replayed,))
    table.forward(4)
    new = old._replace(batch=7, fingerprint=secrets.token_bytes(16))
    assert await store.commit("a", record.stamp, None, [new]) == Committed()
    assert await store.commit("a", record.stamp, None, [old, other]) == Duplicates((new,))
    table.forward(RECEIPT_SECONDS - 2)
    assert await store.commit("a", record.stamp, None, [old]) == Duplicates((new,)), "its time began anew"


async def test_an_expired_receipt_does_not_count_even_when_it_was_not_purged_yet(table: Table, store: Store) -> None:
    record = await created(store, "a")
    many = [receipt() for _ in range(1000)]  # more than one purge takes
    assert await store.commit("a", record.stamp, None, many) == Committed()
    table.forward(RECEIPT_SECONDS + 2)
    for each in many[::-250]:
        assert await store.commit("a", record.stamp, None, [each]) == Committed()


async def test_receipts_go_with_their_layer(store: Store) -> None:
    first = await created(store, "a")
    used = receipt()
    assert await store.commit("a", first.stamp, None, [used]) == Committed()
    assert await store.delete("a", first.stamp) == Committed()
    second = await created(store, "a")
    assert await store.commit("a", second.stamp, None, [used]) == Committed()


async def test_a_name_deleted_and_created_with_the_same_data_is_another_layer(store: Store) -> None:
    first = await created(store, "a", b"same")
    assert await store.delete("a", first.stamp) == Committed()
    assert await store.load("a") == Missing()
    second = await created(store, "a", b"same")
    assert await store.load("a", unless=first.stamp) == second
    assert await store.commit("a", first.stamp, after(first, b"lost"), [receipt()]) == Conflict()
    assert await store.commit("a", first.stamp, None, [receipt()]) == Conflict()
    assert await store.delete("a", first.stamp) == Conflict()
    assert await store.load("a") == second


async def test_concurrent_commits_of_different_layers_all_land(store: Store) -> None:
    names = [f"layer-{n}" for n in range(50)]
    records = await asyncio.gather(*(created(store, name) for name in names))
    for step in range(5):
        nexts = [after(record, f"{step}".encode()) for record in records]
        answers = await asyncio.gather(
            *(
                store.commit(name, record.stamp, new, [receipt()])
                for name, record, new in zip(names, records, nexts, strict=True)
            )
        )
        assert answers == [Committed()] * 50
        records = nexts
    assert await asyncio.gather(*map(store.load, names)) == records


async def test_of_concurrent_commits_on_one_stamp_one_wins_each_round(store: Store) -> None:
    record = await created(store, "a")
    for _ in range(10):
        contenders = [(after(record, secrets.token_bytes(8)), receipt()) for _ in range(10)]
        answers = await asyncio.gather(*(store.commit("a", record.stamp, new, [key]) for new, key in contenders))
        assert sorted(map(repr, answers)) == ["Committed()"] + ["Conflict()"] * 9
        record, key = contenders[answers.index(Committed())]
        assert await store.load("a") == record
        repeated = await store.commit("a", record.stamp, None, [key for _, key in contenders])
        assert repeated == Duplicates((key,)), "only the winner left a receipt"


async def test_who_wins_is_told_how_many_others_have_lost_and_wait(store: Store, table: Table) -> None:
    first, other = await created(store, "a"), await created(store, "b")
    one, two, three = ([receipt(), receipt()] for _ in range(3))

    async def told(name: str, old: Record, new: Record | None, receipts: list[Receipt]) -> int | None:
        answer = await store.commit(name, old.stamp, new, receipts)
        assert isinstance(answer, Committed)
        return answer.contenders

    async def lose(old: Stamp, receipts: list[Receipt]) -> None:
        assert await store.commit("a", old, Record(old.next(RUNTIME.bits(63)), b"late"), receipts) == Conflict()

    second = after(first, b"second")
    third = after(second, b"third")
    fourth = after(third, b"fourth")
    fifth = after(fourth, b"fifth")
    answers = [await told("a", first, second, [receipt()])]
    await lose(first.stamp, one)
    await lose(first.stamp, [*two[:1], receipt()])
    await lose(first.stamp, [])
    await lose(first.stamp._replace(incarnation=1), three)
    assert await store.delete("a", first.stamp) == Conflict()
    answers += [await told("b", other, after(other, b"uncontended"), [receipt()])]
    answers += [await told("a", second, third, [receipt()])]
    await lose(second.stamp, one)
    answers += [await told("a", third, fourth, one), await told("a", fourth, None, [receipt()])]
    answers += [await told("a", fourth, fifth, [receipt(), *two])]
    assert answers == ([0, 0, 2, 1, 1, 0] if table.tells_contenders else [None] * 6)
    await lose(first.stamp, three)
    table.forward(CONTENDER_SECONDS)
    assert await told("a", fifth, after(fifth, b"sixth"), [receipt()]) in (0, None), "they have given up"


async def test_lost_races_are_no_receipts_and_no_names(store: Store) -> None:
    first = await created(store, "a")
    second = after(first, b"second")
    assert await store.commit("a", first.stamp, second, []) == Committed()
    assert await store.commit("a", first.stamp, after(first, b"late"), [receipt()]) == Conflict()
    assert [entry.name for entry in await store.list("", "", 10)] == ["a"]
    assert [lasting async for some in store.receipts() for lasting in some] == []
    assert await store.load("a") == second


async def test_calls_made_in_a_row_without_waiting_take_effect_in_that_row(store: Store) -> None:
    # A Valkey server that does not know a script yet refuses its first call, which is sent again after the others.
    known = await created(store, "a", b"0")
    await store.commit("a", known.stamp, changed := after(known, b"1"), [])
    await store.load("a")
    await store.delete("a", changed.stamp)
    first = await created(store, "a", b"0")
    second = after(first, b"1")
    third = after(second, b"2")
    answers = await asyncio.gather(
        store.commit("a", first.stamp, second, []),
        store.commit("a", second.stamp, third, []),
        store.load("a"),
        store.list("", "", 5),
        store.delete("a", third.stamp),
        store.create("a", b"anew", LIMIT),
    )
    assert answers[0] == answers[1] == answers[4] == Committed()
    anew = answers[5]
    assert isinstance(anew, Record)
    assert answers[2] in (third, anew), "a read never sees what is older than a call before it"
    assert answers[3][0].stamp in (third.stamp, anew.stamp)
    assert anew.stamp.version > third.stamp.version
    assert await store.load("a") == anew


async def test_a_list_is_in_the_order_of_the_names_bytes(store: Store) -> None:
    names = ["a", "A", "a.b", "a/b", "ab", "a_b", "a%b", "aB", "b", "é", "z", "ﬀ", "𝄞", "a-1", "a-10", "a-2", "~"]
    for name in names:
        await created(store, name)
    listed = [entry.name for entry in await store.list("", "", 100)]
    assert listed == sorted(names, key=str.encode)


@pytest.mark.parametrize("prefix", ["a", "A", "a_", "a%", "a.", "é", "𝄞", "𝄞𝄞", "ab", "none", "\U0010ffff", "\ud7ff"])
async def test_a_prefix_matches_exactly(store: Store, prefix: str) -> None:
    names = ["a", "A", "Ab", "a.b", "ab", "a_b", "a%b", "axb", "aB", "b", "e", "é", "éa", "𝄞", "𝄞x", "\U0010ffffx"]
    names += ["\ud7ffx", "\ue000"]
    for name in names:
        await created(store, name)
    listed = [entry.name for entry in await store.list(prefix, "", 100)]
    assert listed == sorted((name for name in names if name.startswith(prefix)), key=str.encode)


async def test_pages_of_a_list_follow_each_other_without_gap_or_repeat(store: Store) -> None:
    names = sorted([f"net.{n}" for n in range(25)] + ["mat", "nets", "zoo"])
    for name in names:
        await created(store, name)
    listed: list[str] = []
    while page := await store.list("net.", listed[-1] if listed else "", 4):
        assert len(page) <= 4
        listed += [entry.name for entry in page]
    assert listed == sorted(name for name in names if name.startswith("net."))
    assert [entry.name for entry in await store.list("net.", "a", 1)] == ["net.0"], "a cursor before the prefix"
    assert await store.list("net.", "zz", 10) == [], "a cursor behind the prefix"
    assert [entry.name for entry in await store.list("", "net.9x", 2)] == ["nets", "zoo"], "a cursor that is no name"
    assert await store.list("", "", 0) == []


async def test_a_list_carries_stamps_and_the_head_of_the_data(store: Store) -> None:
    data = secrets.token_bytes(3 * HEAD_BYTES)
    long = await created(store, "long", data)
    exact = await created(store, "exact", data[:HEAD_BYTES])
    short = await created(store, "short", b"short")
    empty = await created(store, "void", b"")
    assert await store.list("", "", 9) == [
        ("exact", exact.stamp, data[:HEAD_BYTES]),
        ("long", long.stamp, data[:HEAD_BYTES]),
        ("short", short.stamp, b"short"),
        ("void", empty.stamp, b""),
    ]


async def test_a_deleted_record_is_not_listed(store: Store) -> None:
    a, b = await created(store, "a"), await created(store, "b")
    assert await store.delete("a", a.stamp) == Committed()
    assert [entry.name for entry in await store.list("", "", 9)] == ["b"]
    assert await store.delete("b", b.stamp) == Committed()
    assert await store.list("", "", 9) == []


async def test_large_data_come_back_whole(store: Store) -> None:
    data = secrets.token_bytes(16 * 2**20)
    record = await created(store, "large", data)
    assert (await loaded(store, "large")).data == data
    larger = after(record, data[::-1] + b"more")
    assert await store.commit("large", record.stamp, larger, [receipt()]) == Committed()
    assert (await loaded(store, "large")) == larger
    assert (await store.list("", "", 1))[0].head == larger.data[:HEAD_BYTES]


async def test_a_caller_that_is_cancelled_harms_no_other(store: Store) -> None:
    record = await created(store, "a")
    others = [await created(store, f"n{n}") for n in range(10)]
    tasks = [
        asyncio.ensure_future(store.commit(f"n{n}", other.stamp, after(other, b"x"), [receipt()]))
        for n, other in enumerate(others)
    ]
    await asyncio.sleep(0)  # each has made its call
    for task in tasks[::2]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert answers[1::2] == [Committed()] * 5
    for n, other in enumerate(others):
        present = await loaded(store, f"n{n}")
        assert present.stamp == other.stamp or present.data == b"x", "of a cancelled one: wholly or not at all"
    assert await store.commit("a", record.stamp, after(record, b"y"), []) == Committed()


async def test_a_commit_whose_outcome_is_unknown_is_resolved_by_its_receipts(store: Store) -> None:
    record = await created(store, "a")
    new, key = after(record, b"once"), receipt()
    task = asyncio.ensure_future(store.commit("a", record.stamp, new, [key]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await store.commit("a", record.stamp, new, [key]) in (Committed(), Duplicates((key,)))
    assert await store.load("a") == new


async def test_what_was_written_is_there_after_a_restart(table: Table, store: Store) -> None:
    first = await created(store, "a", b"kept")
    gone = await created(store, "gone")
    second, key = after(first, b"kept too"), receipt()
    assert await store.commit("a", first.stamp, second, [key]) == Committed()
    assert await store.delete("gone", gone.stamp._replace()) == Committed()
    await store.close()

    again = table.store()
    await again.open()
    try:
        assert await again.load("a", unless=first.stamp) == second
        assert await again.load("gone") == Missing()
        assert await again.commit("a", second.stamp, None, [key]) == Duplicates((key,))
        assert (await created(again, "gone")).stamp.version > gone.stamp.version
        assert await again.create("c", b"", 2) == Full()
    finally:
        await again.close()


async def test_two_stores_on_one_table_see_each_other(table: Table, store: Store) -> None:
    if not table.shared:
        pytest.skip("one store at a time")
    other = table.store()
    await other.open()
    try:
        assert not store.exclusive
        assert not other.exclusive
        record = await created(store, "a")
        assert await other.load("a") == record
        new, key = after(record, b"by the other"), receipt()
        assert await other.commit("a", record.stamp, new, [key]) == Committed()
        assert await store.load("a", unless=record.stamp) == new
        assert await store.commit("a", record.stamp, after(record, b"stale"), []) == Conflict()
        assert await store.commit("a", new.stamp, None, [key]) == Duplicates((key,))
    finally:
        await other.close()
    assert await store.load("a") == new, "closing one leaves the other open"


async def test_each_increment_through_two_stores_counts_once(table: Table, store: Store) -> None:
    if not table.shared:
        pytest.skip("one store at a time")
    other = table.store()
    await other.open()

    async def increment(through: Store) -> None:
        for _ in range(20):
            while True:
                record = await loaded(through, "a")
                new = after(record, str(int(record.data) + 1).encode())
                if await through.commit("a", record.stamp, new, [receipt()]) == Committed():
                    break

    try:
        first = await created(store, "a", b"0")
        await asyncio.gather(*map(increment, [store, other, store, other]))
        last = await loaded(store, "a")
        assert last.data == b"80"
        assert last.stamp.version - first.stamp.version == 80
    finally:
        await other.close()


async def test_a_store_that_is_not_open_answers_nothing(table: Table, anyio_backend: str) -> None:
    store = table.store()
    stamp = Stamp(1, 1, 1)
    await store.close()
    for _ in range(2):
        for call in (
            store.ping,
            lambda: store.load("a"),
            lambda: store.create("a", b"", LIMIT),
            lambda: store.commit("a", stamp, None, []),
            lambda: store.delete("a", stamp),
            lambda: store.list("", "", 1),
        ):
            with pytest.raises(StoreError):
                await call()
        await store.open()
        await store.ping()
        await store.close()
        await store.close()


async def test_close_finishes_what_was_begun(table: Table, anyio_backend: str) -> None:
    store = table.store()
    await store.open()
    tasks = [asyncio.ensure_future(store.create(f"n{n}", b"", LIMIT)) for n in range(20)]
    await asyncio.sleep(0)
    await store.close()
    answers = await asyncio.gather(*tasks)
    assert all(isinstance(answer, Record) for answer in answers)
