"""How shards of a group meet in a store: part of the conformance suite, run against every store."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from batchnorm_service.store.base import GroupStatus, Missing, Shard, Store
from store.harness import RECEIPT_SECONDS, Table, created

pytestmark = pytest.mark.anyio

GROUP = b"g" * 16


def shard(member: int, part: bytes = b"part") -> Shard:
    return Shard(bytes([member]) * 16, bytes([member + 100]) * 16, part + bytes([member]))


async def test_shards_gather_until_the_group_is_complete(store: Store) -> None:
    made = (await created(store, "a")).stamp.incarnation
    first = await store.join("a", made, GROUP, 2, shard(2))
    assert first == GroupStatus(2, {shard(2).member: shard(2).fingerprint}, ())
    second = await store.join("a", made, GROUP, 2, shard(1))
    assert isinstance(second, GroupStatus)
    assert second.members == {shard(n).member: shard(n).fingerprint for n in (1, 2)}
    assert second.parts == (shard(1).part, shard(2).part)  # in the order of the members' keys
    assert await store.join("a", made, GROUP, 2, shard(2)) == second


async def test_a_member_that_is_there_keeps_its_first_part(store: Store) -> None:
    made = (await created(store, "a")).stamp.incarnation
    await store.join("a", made, GROUP, 1, shard(1))
    again = await store.join("a", made, GROUP, 1, shard(1)._replace(fingerprint=b"x" * 16, part=b"other"))
    assert again == GroupStatus(1, {shard(1).member: shard(1).fingerprint}, (shard(1).part,))


async def test_a_surplus_member_and_another_size_are_not_added(store: Store) -> None:
    made = (await created(store, "a")).stamp.incarnation
    await store.join("a", made, GROUP, 2, shard(1))
    other = await store.join("a", made, GROUP, 3, shard(2))
    assert other == GroupStatus(2, {shard(1).member: shard(1).fingerprint}, ())
    complete = await store.join("a", made, GROUP, 2, shard(2))
    assert await store.join("a", made, GROUP, 2, shard(3)) == complete


async def test_groups_layers_and_incarnations_are_apart(store: Store) -> None:
    a, b = [(await created(store, name)).stamp.incarnation for name in "ab"]
    await store.join("a", a, GROUP, 1, shard(1))
    for name, incarnation, group in (("a", a, b"h" * 16), ("b", b, GROUP)):
        alone = await store.join(name, incarnation, group, 1, shard(2))
        assert isinstance(alone, GroupStatus)
        assert list(alone.members) == [shard(2).member]
    assert await store.join("a", b, GROUP, 1, shard(1)) == Missing()
    assert await store.join("nothing", a, GROUP, 1, shard(1)) == Missing()


async def test_members_leave_one_by_one_or_all_at_once(store: Store) -> None:
    made = (await created(store, "a")).stamp.incarnation
    for member in (1, 2):
        await store.join("a", made, GROUP, 3, shard(member))
    await store.leave("a", made, GROUP, shard(1).member)
    await store.leave("a", made, GROUP, shard(9).member)
    left = await store.join("a", made, GROUP, 3, shard(3))
    assert isinstance(left, GroupStatus)
    assert list(left.members) == [shard(2).member, shard(3).member]
    await store.leave("a", made, GROUP, None)
    again = await store.join("a", made, GROUP, 7, shard(4))
    assert again == GroupStatus(7, {shard(4).member: shard(4).fingerprint}, ())
    await store.leave("a", made, b"none" * 4, None)


async def test_shards_are_forgotten_when_receipts_are(table: Table, store: Store) -> None:
    made = (await created(store, "a")).stamp.incarnation
    await store.join("a", made, GROUP, 2, shard(1))
    table.forward(RECEIPT_SECONDS + 2)
    later = await store.join("a", made, GROUP, 2, shard(2))
    assert later == GroupStatus(2, {shard(2).member: shard(2).fingerprint}, ())


async def test_of_many_that_come_at_once_only_as_many_as_fit_are_members(store: Store) -> None:
    made = (await created(store, "a")).stamp.incarnation
    keys = [secrets.token_bytes(16) for _ in range(20)]
    found = await asyncio.gather(
        *(store.join("a", made, GROUP, 8, Shard(key, bytes(16), key)) for key in keys), return_exceptions=True
    )
    complete = [one for one in found if isinstance(one, GroupStatus) and one.parts]
    assert complete
    assert all(one.parts == complete[0].parts and len(one.parts) == 8 for one in complete)
