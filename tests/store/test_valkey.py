"""What only the Valkey store does: the layout, long listings, and round trips that calls share."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator

import pytest
from valkey.crc import key_slot

from batchnorm_service.layers import GroupCall
from batchnorm_service.store.base import (
    Committed,
    Conflict,
    Duplicates,
    Full,
    GroupStatus,
    Record,
    Shard,
    Unchanged,
)
from batchnorm_service.store.valkey.connection import ServerConnection
from batchnorm_service.store.valkey.keys import BUCKET_SLOTS, BUCKETS, SLOTS, TAGS, Keys, bucket_of
from batchnorm_service.store.valkey.store import ValkeyStore
from layers.conftest import CONFIG, batch, serving, train
from store.harness import LIMIT, RECEIPT_SECONDS, after, created, receipt
from store.valkey_servers import Server, flush

pytestmark = pytest.mark.anyio
RIGHTS = [
    "+@read",
    "+@write",
    "+@scripting",
    "+info",
    "+time",
    "+select",
    "+wait",
    "+cluster|slots",
    "+client|setname",
]  # docs/durability.md
SLOW = 30.0  # seconds that nothing should take


@pytest.fixture
async def opened(anyio_backend: str, valkey_server: Server) -> AsyncIterator[ValkeyStore]:
    flush([valkey_server])
    store = ValkeyStore(valkey_server.url, RECEIPT_SECONDS, timeout=SLOW)
    await store.open()
    yield store
    await store.close()


# -------------------------------------------------------------------------------------------------------- layout


def test_the_layout_never_changes() -> None:
    """A layer that moved to another bucket would be lost: whoever changes this raises the schema version."""
    assert [slot * BUCKETS // SLOTS for slot in BUCKET_SLOTS] == list(range(BUCKETS)), "an even share of the slots each"
    assert hashlib.sha256(b",".join(TAGS)).hexdigest()[:16] == "7b3ec5cd7c4ea157"
    assert [bucket_of(name) for name in ("a", "net.bn1", "é")] == [67, 112, 62]


async def test_all_that_belongs_to_a_layer_is_in_one_hash_slot(opened: ValkeyStore, valkey_server: Server) -> None:
    names = ["a", "net.{x}bn1", "}{", "é" * 50]
    for name in names:
        record = await created(opened, name)
        await opened.commit(name, record.stamp, after(record, b"new"), [receipt(), receipt()], 1)
        assert await opened.pin(name, record.stamp, "tag", b"", 1) == Committed()
    slots: dict[int, list[bytes]] = {}
    for key in valkey_server.command("KEYS", "*"):
        slots.setdefault(key_slot(key), []).append(key)
    keys = Keys("bn")
    for name in names:
        slot = slots[BUCKET_SLOTS[bucket_of(name)]]
        assert keys.record(name) in slot
        assert keys.names(bucket_of(name)) in slot
        assert set(keys.history(name)) <= set(slot)
        assert sum(b"}r:" in key for key in slot) == 2


async def test_nothing_of_a_deleted_layer_stays_but_what_expires(opened: ValkeyStore, valkey_server: Server) -> None:
    for _ in range(3):
        records = {name: await created(opened, name) for name in map(str, range(600))}
        await asyncio.gather(*(opened.commit(name, each.stamp, None, [receipt()]) for name, each in records.items()))
        await asyncio.gather(*(opened.pin(name, each.stamp, "tag", b"", 1) for name, each in records.items()))
        await asyncio.gather(*(opened.delete(name, each.stamp, with_pins=True) for name, each in records.items()))
        assert await opened.list("", "", 1) == []
    lasting = [key for key in valkey_server.command("KEYS", "*") if valkey_server.admin.ttl(key) < 0]
    assert len(lasting) <= BUCKETS + 1, "a floor for each bucket, and the schema version"


async def test_a_receipt_takes_as_many_bytes_as_the_documentation_says(
    opened: ValkeyStore, valkey_server: Server
) -> None:
    record = await created(opened, "a")
    before = int(valkey_server.info("used_memory"))
    for _ in range(20):
        await opened.commit("a", record.stamp, None, [receipt() for _ in range(1000)])
    each = (int(valkey_server.info("used_memory")) - before) / 20_000
    assert 100 < each < 250, "about 130 with Valkey 9, 240 with Redis 7.0"


# ------------------------------------------------------------------------------------------------------- listing


async def test_a_list_of_many_layers_asks_again_where_more_are_than_expected(opened: ValkeyStore) -> None:
    names = sorted(f"net.{n}" for n in range(3000))
    # All in one bucket, where a fair share of a page would be less than one.
    crowded = sorted([name for n in range(30_000) if bucket_of(name := f"crowd.{n}") == 7][:100])
    await asyncio.gather(*(opened.create(name, b"", LIMIT) for name in (*names, *crowded)))
    assert [entry.name for entry in await opened.list("crowd.", "", 1000)] == crowded
    assert [entry.name for entry in await opened.list("", "", 5000)] == crowded + names
    listed: list[str] = []
    while page := await opened.list("net.", listed[-1] if listed else "", 700):
        listed += [entry.name for entry in page]
    assert listed == names


async def test_a_page_is_full_although_layers_are_deleted_while_it_is_read(opened: ValkeyStore) -> None:
    records = {name: await created(opened, name) for name in (f"n{n:03}" for n in range(200))}
    page = asyncio.ensure_future(opened.list("", "", 50))
    await asyncio.sleep(0)  # the names are being read
    gone = [name for name in records if name < "n040"]
    await asyncio.gather(*(opened.delete(name, records[name].stamp) for name in gone))
    names = [entry.name for entry in await page]
    assert len(names) == 50, "a short page would look like the last one"
    assert names == sorted(names)


async def test_room_that_another_process_made_is_found(opened: ValkeyStore, valkey_server: Server) -> None:
    other = ValkeyStore(valkey_server.url, timeout=SLOW)
    await other.open()
    try:
        first = await created(opened, "a")
        await created(opened, "b")
        assert await opened.create("c", b"", 2) == Full()
        assert await other.delete("a", first.stamp) == Committed()
        assert isinstance(await opened.create("c", b"", 2), Record)
    finally:
        await other.close()


# --------------------------------------------------------------------------------------------------- round trips


async def test_calls_that_wait_together_share_round_trips(opened: ValkeyStore, valkey_server: Server) -> None:
    names = [f"n{n}" for n in range(100)]
    records = [await created(opened, name) for name in names]
    before = int(valkey_server.info("total_reads_processed"))
    answers = await asyncio.gather(
        *(
            opened.commit(name, each.stamp, after(each, b"x"), [receipt()])
            for name, each in zip(names, records, strict=True)
        )
    )
    assert answers == [Committed()] * 100
    assert int(valkey_server.info("total_reads_processed")) - before < 50


async def test_receipts_are_asked_for_in_one_round_trip(opened: ValkeyStore, valkey_server: Server) -> None:
    """Each look at a group took two, and wrote a note of a lost race."""
    record, used = await created(opened, "a"), receipt()
    assert await opened.commit("a", record.stamp, None, [used]) == Committed()
    keys = set(valkey_server.command("KEYS", "*"))
    await opened.find_receipts("a", record.stamp.incarnation, [used.key])  # the server knows the script from now on
    before = valkey_server.admin.info("commandstats")["cmdstat_evalsha"]["calls"]
    for found, key in (((used,), used.key), ((), receipt().key)):
        assert await opened.find_receipts("a", record.stamp.incarnation, [key]) == found
    assert valkey_server.admin.info("commandstats")["cmdstat_evalsha"]["calls"] - before == 2
    assert set(valkey_server.command("KEYS", "*")) == keys


@pytest.fixture
def lost_joins(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The reply to the next `JOIN` is lost, after the server has done it; what was lost is in the list."""
    reply, lost = ServerConnection.read_reply, []

    async def lose(link: ServerConnection) -> object:
        answer = await reply(link)
        if not lost and isinstance(answer, list) and len(answer) == 4:
            lost.append(answer)
            raise ConnectionResetError(104, "Connection reset by peer")
        return answer

    monkeypatch.setattr(ServerConnection, "read_reply", lose)
    return lost


async def test_a_join_whose_reply_was_lost_has_added_its_caller(opened: ValkeyStore, lost_joins: list[object]) -> None:
    made = (await created(opened, "a")).stamp.incarnation
    first = Shard(b"1" * 16, bytes(16), b"part")
    answer = await opened.join("a", made, b"g" * 16, 2, first)
    assert lost_joins
    assert answer == GroupStatus(2, {first.member: first.fingerprint}, ())
    assert answer.added
    again = await opened.join("a", made, b"g" * 16, 2, first)
    assert again == answer
    assert not again.added, "this is another call"


async def test_a_member_whose_first_join_lost_its_reply_is_not_told_of_a_replay(
    opened: ValkeyStore, valkey_server: Server, lost_joins: list[object]
) -> None:
    """Seen: `Idempotent-Replay: true` on a call that had never been made before."""
    async with serving(ValkeyStore(valkey_server.url, RECEIPT_SECONDS, timeout=SLOW)) as layers:
        await layers.create("a", CONFIG)
        answers = [await train(layers, "a", batch(1), "key", group=GroupCall("g", 1)) for _ in range(2)]
        assert lost_joins
        assert [answer.replayed for answer in answers] == [False, True]
        assert [answer.num_batches_tracked for answer in answers] == [1, 1]


async def test_an_unchanged_record_is_not_sent(opened: ValkeyStore, valkey_server: Server) -> None:
    record = await created(opened, "a", bytes(1 << 20))
    before = int(valkey_server.info("total_net_output_bytes"))
    for _ in range(10):
        assert await opened.load("a", record.stamp) == Unchanged()
    assert int(valkey_server.info("total_net_output_bytes")) - before < 1 << 17, "INFO's own answers are in it"


async def test_cancelled_calls_never_mix_up_the_answers_of_others(opened: ValkeyStore) -> None:
    records = {f"n{n}": await created(opened, f"n{n}", b"%d" % n) for n in range(50)}
    for round_ in range(20):
        loads = [asyncio.ensure_future(opened.load(name)) for name in records]
        for _ in range(round_ % 5):
            await asyncio.sleep(0)
        for load in loads[round_ % 3 :: 3]:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        assert [await opened.load(name) for name in list(records)[:3]] == list(records.values())[:3]
        for load, record in zip(loads, records.values(), strict=True):
            assert load.cancelled() or load.result() == record


async def test_a_script_that_the_server_forgot_is_sent_again(opened: ValkeyStore, valkey_server: Server) -> None:
    record = await created(opened, "a")
    for _ in range(3):
        valkey_server.command("SCRIPT", "FLUSH")
        record, old, key = after(record, b"next"), record, receipt()
        assert await opened.commit("a", old.stamp, record, [key]) == Committed()
        valkey_server.command("SCRIPT", "FLUSH")
        assert await asyncio.gather(*(opened.load("a", record.stamp) for _ in range(10))) == [Unchanged()] * 10


async def test_a_call_whose_script_the_server_forgot_is_finished_by_close(
    opened: ValkeyStore, valkey_server: Server
) -> None:
    """It had to be sent a second time, and was told that the store is closed."""
    valkey_server.command("SCRIPT", "FLUSH")
    tasks = [asyncio.ensure_future(opened.create(f"n{n}", b"", LIMIT)) for n in range(5)]
    await asyncio.sleep(0)
    await opened.close()
    assert all(isinstance(answer, Record) for answer in await asyncio.gather(*tasks))


async def test_conflicts_are_told_from_stale_incarnations(opened: ValkeyStore) -> None:
    first = await created(opened, "a")
    await opened.delete("a", first.stamp)
    second = await created(opened, "a")
    key = receipt()
    assert await opened.commit("a", second.stamp, None, [key]) == Committed()
    assert await opened.commit("a", first.stamp, after(first, b"x"), [key]) == Duplicates((key,))
    assert await opened.commit("a", first.stamp, after(first, b"x"), [receipt()]) == Conflict()


@pytest.fixture
def at_once(valkey_server: Server) -> Iterator[None]:
    """The log is written before each reply; by default it waits while the disk is busy, two seconds at most."""
    (_, usual) = valkey_server.command("CONFIG", "GET", "appendfsync")
    valkey_server.command("CONFIG", "SET", "appendfsync", "always")
    yield
    valkey_server.command("CONFIG", "SET", "appendfsync", usual)


@pytest.mark.usefixtures("at_once")
async def test_lost_races_are_noted_for_a_moment_and_reach_no_disk(opened: ValkeyStore, valkey_server: Server) -> None:
    first = await created(opened, "a")
    second = after(first, b"second")
    assert await opened.commit("a", first.stamp, second, []) == Committed()
    before = valkey_server.info("aof_current_size")
    keys = set(valkey_server.command("KEYS", "*"))
    for _ in range(20):
        assert await opened.commit("a", first.stamp, after(first, b"late"), [receipt()]) == Conflict()
    assert valkey_server.info("aof_current_size") == before
    (note,) = set(valkey_server.command("KEYS", "*")) - keys
    assert valkey_server.command("ZCARD", note) == 20
    assert 0 < valkey_server.admin.pttl(note) <= 1000
    third = after(second, bytes(10_000))
    assert await opened.commit("a", second.stamp, third, [receipt()]) == Committed()
    await opened.ping()
    assert int(valkey_server.info("aof_current_size")) > int(before) + 10_000, "what wins is written as ever"


async def test_a_lost_race_counts_from_when_it_was_lost_first(opened: ValkeyStore, valkey_server: Server) -> None:
    first = await created(opened, "a")
    second, old = after(first, b"second"), receipt()
    assert await opened.commit("a", first.stamp, second, []) == Committed()
    assert await opened.commit("a", first.stamp, after(first, b"late"), [old]) == Conflict()
    (note,) = [key for key in valkey_server.command("KEYS", "*") if b"}c:" in key]
    ((member, since),) = valkey_server.admin.zrange(note, 0, -1, withscores=True)
    valkey_server.admin.zadd(note, {member: since - 1.01})
    for key in (old, receipt()):
        assert await opened.commit("a", first.stamp, after(first, b"late"), [key]) == Conflict()
    answer = await opened.commit("a", second.stamp, after(second, b"third"), [])
    assert isinstance(answer, Committed)
    assert answer.contenders == 1, "the one that lost just now"
