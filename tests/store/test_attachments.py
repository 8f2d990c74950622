"""Attachments of records, in every store."""

from __future__ import annotations

import asyncio

import pytest

from batchnorm_service.store.base import Attachment, Committed, Conflict, Missing, Record, Store
from store.harness import Table, after, created, loaded, receipt

pytestmark = pytest.mark.anyio

FIRST, SECOND, THIRD = Attachment(1, b"first \x00\xff"), Attachment((1 << 63) - 1, b""), Attachment(3, b"third")


async def read(store: Store, record: Record, key: str = "k") -> Attachment | Missing | None:
    return await store.attachment("a", record.stamp.incarnation, key)


async def attach(
    store: Store, record: Record, new: Attachment, expected: Attachment | None, key: str = "k"
) -> Committed | Conflict | Missing:
    known = None if expected is None else expected.commit_id
    return await store.attach("a", record.stamp.incarnation, key, new, known)


async def test_nothing_is_attached_to_a_name_without_a_record(store: Store) -> None:
    assert await store.attachment("a", 1, "k") == Missing()
    assert await store.attach("a", 1, "k", FIRST, None) == Missing()
    assert await store.attachment("a", 1, "k") == Missing()


async def test_attachments_are_replaced_by_compare_and_set(store: Store) -> None:
    record = await created(store, "a")
    assert await read(store, record) is None
    assert await attach(store, record, SECOND, FIRST) == Conflict()
    assert await read(store, record) is None
    assert await attach(store, record, FIRST, None) == Committed()
    assert await read(store, record) == FIRST
    assert await attach(store, record, THIRD, None) == Conflict()
    assert await attach(store, record, THIRD, SECOND) == Conflict()
    assert await read(store, record) == FIRST
    assert await attach(store, record, SECOND, FIRST) == Committed()
    assert await read(store, record) == SECOND


async def test_a_repeated_call_is_committed_until_another_took_effect(store: Store) -> None:
    record = await created(store, "a")
    assert await attach(store, record, FIRST, None) == Committed()
    assert await attach(store, record, FIRST, None) == Committed()
    assert await attach(store, record, SECOND, FIRST) == Committed()
    assert await attach(store, record, FIRST, None) == Conflict()
    assert await read(store, record) == SECOND


async def test_keys_and_layers_do_not_share_attachments(store: Store) -> None:
    record, other = await created(store, "a"), await created(store, "b")
    assert await attach(store, record, FIRST, None, "k") == Committed()
    assert await attach(store, record, THIRD, None, "K") == Committed()
    assert await read(store, record, "k") == FIRST
    assert await read(store, record, "K") == THIRD
    assert await store.attachment("b", other.stamp.incarnation, "k") is None
    assert await store.attachment("b", record.stamp.incarnation, "k") == Missing()


async def test_an_attachment_is_no_part_of_the_record(store: Store) -> None:
    record = await created(store, "a")
    assert await attach(store, record, FIRST, None) == Committed()
    assert await loaded(store, "a") == record
    new = after(record, b"new")
    assert await store.commit("a", record.stamp, new, [receipt()], 5) == Committed()
    assert await loaded(store, "a") == new
    assert await read(store, new) == FIRST
    assert [entry.name for entry in await store.list("", "", 10)] == ["a"]


async def test_attachments_go_with_their_layer(store: Store) -> None:
    record = await created(store, "a")
    assert await attach(store, record, FIRST, None) == Committed()
    assert await store.delete("a", record.stamp) == Committed()
    assert await read(store, record) == Missing()
    again = await created(store, "a")
    assert await read(store, again) is None
    assert await read(store, record) == Missing()
    assert await attach(store, record, SECOND, FIRST) == Missing()
    assert await read(store, again) is None


async def test_of_many_who_replace_the_same_one_wins(store: Store) -> None:
    record = await created(store, "a")
    assert await attach(store, record, FIRST, None) == Committed()
    rivals = [Attachment(10 + n, b"%d" % n) for n in range(20)]
    outcomes = await asyncio.gather(*(attach(store, record, rival, FIRST) for rival in rivals))
    winners = [rival for rival, outcome in zip(rivals, outcomes, strict=True) if outcome == Committed()]
    assert len(winners) == 1
    assert outcomes.count(Conflict()) == len(rivals) - 1
    assert await read(store, record) == winners[0]


async def test_large_attachments(store: Store) -> None:
    record = await created(store, "a")
    large = Attachment(7, bytes(range(256)) * 4096)
    assert await attach(store, record, large, None) == Committed()
    assert await read(store, record) == large


async def test_attachments_outlive_the_store_object(table: Table) -> None:
    store = table.store()
    await store.open()
    record = await created(store, "a")
    assert await attach(store, record, FIRST, None) == Committed()
    await store.close()
    store = table.store()
    await store.open()
    try:
        assert await read(store, record) == FIRST
    finally:
        await store.close()
