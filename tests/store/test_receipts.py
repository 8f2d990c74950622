"""How receipts are asked for without writing: part of the conformance suite, run against every store."""

from __future__ import annotations

import secrets

import pytest

from batchnorm_service.store.base import Committed, Missing, Store, Unchanged
from store.harness import RECEIPT_SECONDS, Table, after, created, receipt

pytestmark = pytest.mark.anyio


async def test_receipts_are_found_as_they_were_written_and_nothing_changes(store: Store) -> None:
    record = await created(store, "a")
    used, other = [receipt(batch=n) for n in range(5)], receipt()
    second = after(record, b"second")
    assert await store.commit("a", record.stamp, second, [*used, other]) == Committed()
    unknown = secrets.token_bytes(16)
    keys = [used[3].key, unknown, *(each.key for each in used), used[0].key]
    for _ in range(2):
        found = await store.find_receipts("a", record.stamp.incarnation, keys)
        assert not isinstance(found, Missing)
        assert sorted(found) == sorted(used)
    assert await store.find_receipts("a", record.stamp.incarnation, [unknown]) == ()
    assert await store.find_receipts("a", record.stamp.incarnation, []) == ()
    assert await store.load("a", second.stamp) == Unchanged()


async def test_receipts_of_a_name_or_an_incarnation_that_is_not_there(store: Store) -> None:
    used = receipt()
    assert await store.find_receipts("a", 1, [used.key]) == Missing()
    first = await created(store, "a")
    assert await store.commit("a", first.stamp, None, [used]) == Committed()
    assert await store.find_receipts("a", first.stamp.incarnation ^ 1, [used.key]) == Missing()
    assert await store.find_receipts("b", first.stamp.incarnation, [used.key]) == Missing()
    assert await store.delete("a", first.stamp) == Committed()
    assert await store.find_receipts("a", first.stamp.incarnation, [used.key]) == Missing()
    second = await created(store, "a")
    assert await store.find_receipts("a", first.stamp.incarnation, [used.key]) == Missing()
    assert await store.find_receipts("a", second.stamp.incarnation, [used.key]) == ()


async def test_a_receipt_that_has_expired_is_not_found(table: Table, store: Store) -> None:
    record = await created(store, "a")
    old, new = receipt(), receipt()
    assert await store.commit("a", record.stamp, None, [old]) == Committed()
    table.forward(RECEIPT_SECONDS - 100)
    assert await store.commit("a", record.stamp, None, [new]) == Committed()
    keys = [old.key, new.key]
    found = await store.find_receipts("a", record.stamp.incarnation, keys)
    assert not isinstance(found, Missing)
    assert sorted(found) == sorted([old, new])
    table.forward(102)
    assert await store.find_receipts("a", record.stamp.incarnation, keys) == (new,), "asking renewed nothing"


async def test_many_receipts_are_found_at_once(store: Store) -> None:
    record = await created(store, "a")
    many = [receipt(batch=n) for n in range(3000)]
    assert await store.commit("a", record.stamp, None, many) == Committed()
    found = await store.find_receipts("a", record.stamp.incarnation, [each.key for each in many])
    assert not isinstance(found, Missing)
    assert set(found) == set(many)
