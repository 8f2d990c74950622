"""WAIT: what is acknowledged is on the replicas, and a replay is no way around that."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from batchnorm_service.store.base import (
    Committed,
    Conflict,
    Duplicates,
    Exists,
    Missing,
    NotKept,
    Pin,
    Pinned,
    ReceiptWithTTL,
    StoreError,
    StoreRefusedError,
)
from batchnorm_service.store.sqlite.store import SqliteStore
from batchnorm_service.store.valkey.keys import Keys, pack_stamp
from batchnorm_service.store.valkey.store import ValkeyStore
from batchnorm_service.transfer import Report, migrate
from store.harness import LIMIT, RECEIPT_SECONDS, after, created, receipt
from store.valkey_servers import Server, flush, let_pass, replicated, wait_for

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    with replicated(tmp_path_factory.mktemp("replicated")) as pair:
        yield pair


@pytest.fixture
def primary(pair: tuple[Server, Server]) -> Server:
    flush(pair[:1])
    return pair[0]


@pytest.fixture
def replica(pair: tuple[Server, Server]) -> Iterator[Server]:
    yield pair[1]
    pair[1].signal(signal.SIGCONT)


@pytest.fixture
async def patient(anyio_backend: str, primary: Server) -> AsyncIterator[ValkeyStore]:
    """Waits for the replica as long as it takes."""
    store = ValkeyStore(primary.url, RECEIPT_SECONDS, timeout=30, wait_replicas=1, wait_timeout=30)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def hasty(anyio_backend: str, primary: Server) -> AsyncIterator[ValkeyStore]:
    """Another process, as it were, that soon gives up waiting."""
    store = ValkeyStore(primary.url, RECEIPT_SECONDS, timeout=30, wait_replicas=1, wait_timeout=0.05)
    await store.open()
    yield store
    await store.close()


@asynccontextmanager
async def stranger(server: Server, wait_replicas: int = 1) -> AsyncIterator[ValkeyStore]:
    """One that gives up soon, too, and whose connections have written nothing yet: a WAIT there waits for nothing."""
    store = ValkeyStore(server.url, RECEIPT_SECONDS, timeout=30, wait_replicas=wait_replicas, wait_timeout=0.05)
    await store.open()
    yield store
    await store.close()


async def test_what_is_acknowledged_is_on_the_replica(patient: ValkeyStore, replica: Server) -> None:
    record = await created(patient, "a")
    key = Keys("bn").record("a")
    for n in range(200):
        record, old = after(record, b"%d" % n), record
        assert await patient.commit("a", old.stamp, record, [receipt()]) == Committed()
        assert replica.admin.get(key)[24:] == record.data
    assert replica.admin.hlen(Keys("bn").history("a")[0]) == 0
    assert await patient.pin("a", record.stamp, "tag", b"data", 1) == Committed()
    assert [replica.admin.hlen(each) for each in Keys("bn").history("a")] == [1, 1]
    assert await patient.commit("a", record.stamp, newest := after(record, b"kept"), [], 5) == Committed()
    assert replica.admin.hgetall(Keys("bn").history("a")[0]) == {pack_stamp(record.stamp): record.data}
    assert await patient.delete("a", newest.stamp, with_pins=True) == Committed()
    assert [replica.admin.exists(each) for each in (key, *Keys("bn").history("a"))] == [0, 0, 0]


async def test_nothing_is_acknowledged_without_the_replica_and_no_replay_either(
    patient: ValkeyStore, hasty: ValkeyStore, primary: Server, replica: Server
) -> None:
    """Seen: WAIT on another connection, or after a script that wrote nothing, returns at once and says nothing."""
    first = await created(patient, "a")
    gone, reborn = await created(patient, "gone"), await created(patient, "reborn")
    second, key = after(first, b"second"), receipt()
    lasting = ReceiptWithTTL(0, receipt(), 100.0)
    pinned, made = await created(patient, "pinned"), first.stamp.incarnation
    pin = Pin("tag", pinned.stamp.version, b"data")
    own = pinned.stamp.incarnation
    assert await patient.pin("pinned", pinned.stamp, "old", b"", 9) == Committed()
    calls: list[tuple[str, Callable[[ValkeyStore], Awaitable[object]], object]] = [
        ("a batch", lambda store: store.commit("a", first.stamp, second, [key]), Duplicates((key,))),
        ("its receipt", lambda store: store.find_receipts("a", made, [key.key]), (key,)),
        ("a layer", lambda store: store.create("new", b"new", LIMIT), Exists),
        ("no layer", lambda store: store.delete("gone", gone.stamp), Missing()),
        ("another layer", lambda store: store.delete("reborn", reborn.stamp), Conflict()),
        ("a receipt", lambda store: store.import_receipts("a", made, [lasting]), Committed()),
        ("a pin", lambda store: store.pin("pinned", pinned.stamp, "tag", b"data", 9), Pinned(pin)),
        ("no pin", lambda store: store.unpin("pinned", own, "old", 3), NotKept()),
        ("a history", lambda store: store.import_history("a", made, [first], [Pin("tag", 1, b"")]), Committed()),
    ]
    replica.signal(signal.SIGSTOP)
    with pytest.raises(StoreError):
        await hasty.delete("reborn", reborn.stamp)
    with pytest.raises(StoreError):
        await hasty.create("reborn", b"again", LIMIT)
    for _ in range(2):
        for what, call, _ in calls:
            with pytest.raises(StoreError, match=r"0 of 1 replicas have it after 0\.05 s"):
                await call(hasty)
            async with stranger(primary) as another:
                with pytest.raises(StoreError, match="0 of 1 replicas"):
                    assert await call(another) == "no answer", what
    assert await hasty.load("a") == second, "reads go on, and see what is not acknowledged"
    assert await hasty.find_receipts("a", made, [receipt().key]) == (), "nothing to wait for"
    assert await hasty.load_kept("pinned", "tag") == pinned

    waiting = [asyncio.ensure_future(call(patient)) for _, call, _ in calls]
    await asyncio.to_thread(wait_for, "a call waits for the replica", lambda: primary.info("blocked_clients") != "0")
    assert not any(call.done() for call in waiting)
    replica.signal(signal.SIGCONT)
    for (what, _, outcome), answer in zip(calls, await asyncio.gather(*waiting), strict=True):
        assert outcome in {answer, type(answer)}, what


async def test_a_replay_renews_its_receipt_on_the_replica_too(
    patient: ValkeyStore, hasty: ValkeyStore, primary: Server, replica: Server
) -> None:
    first = await created(patient, "a")
    second, key = after(first, b"second"), receipt()
    name = Keys("bn").receipt("a", first.stamp.incarnation, key.key)
    replica.signal(signal.SIGSTOP)
    with pytest.raises(StoreError, match="0 of 1 replicas"):
        await hasty.commit("a", first.stamp, second, [key])
    for expected, record in ((first.stamp, second), (first.stamp._replace(version=-1), None)):
        let_pass([primary], RECEIPT_SECONDS / 2)
        assert primary.admin.pttl(name) <= 500 * RECEIPT_SECONDS
        async with stranger(primary) as another:
            with pytest.raises(StoreError, match="0 of 1 replicas") as failed:
                await another.commit("a", expected, record, [key])
        assert primary.admin.pttl(name) > 900 * RECEIPT_SECONDS, (record, failed.value)
    replica.kill()
    async with stranger(primary) as another:
        with pytest.raises(StoreError, match="0 of 1 replicas"):
            await another.commit("a", first.stamp, second, [key])
    replica.start()
    wait_for("the replica is in step", lambda: replica.info("master_link_status") == "up")
    let_pass([primary], RECEIPT_SECONDS / 2)
    assert await patient.commit("a", first.stamp, second, [key]) == Duplicates((key,))
    assert primary.admin.pttl(name) > 900 * RECEIPT_SECONDS
    assert replica.admin.pttl(name) > 900 * RECEIPT_SECONDS
    assert await patient.load("a") == second


async def test_a_receipt_is_never_shortened_and_without_wait_never_renewed(
    patient: ValkeyStore, primary: Server
) -> None:
    record = await created(patient, "a")
    moved = ReceiptWithTTL(0, receipt(), 2 * RECEIPT_SECONDS)
    name = Keys("bn").receipt("a", record.stamp.incarnation, moved.receipt.key)
    assert await patient.import_receipts("a", record.stamp.incarnation, [moved]) == Committed()
    assert await patient.commit("a", record.stamp, None, [moved.receipt]) == Duplicates((moved.receipt,))
    assert primary.admin.pttl(name) > 1900 * RECEIPT_SECONDS
    let_pass([primary], 1.5 * RECEIPT_SECONDS)
    async with stranger(primary, wait_replicas=0) as plain:
        assert await plain.commit("a", record.stamp, None, [moved.receipt]) == Duplicates((moved.receipt,))
    assert primary.admin.pttl(name) <= 500 * RECEIPT_SECONDS


async def test_a_migration_is_not_complete_before_the_replicas_have_it(
    primary: Server, replica: Server, tmp_path: Path
) -> None:
    """Seen: a second run found on the primary what the first had written there, and asked for no more."""
    source = SqliteStore(tmp_path / "source.db")
    await source.open()
    await created(source, "a")  # that has no receipt
    await source.close()
    target = ValkeyStore(primary.url, timeout=30, wait_replicas=1, wait_timeout=0.5)
    replica.signal(signal.SIGSTOP)
    for _ in range(2):
        with pytest.raises(StoreError, match="0 of 1 replicas"):
            await migrate(source, target, lambda *_: None)
    replica.signal(signal.SIGCONT)
    assert await migrate(source, target, lambda *_: None) == Report(present=1)


async def test_reads_do_not_stand_behind_writes_that_wait(
    patient: ValkeyStore, primary: Server, replica: Server
) -> None:
    records = [await created(patient, f"n{n}") for n in range(20)]
    replica.signal(signal.SIGSTOP)
    waiting = [
        asyncio.ensure_future(patient.commit(f"n{n}", record.stamp, after(record, b"x"), [receipt()]))
        for n, record in enumerate(records)
    ]
    await asyncio.to_thread(wait_for, "both connections wait", lambda: primary.info("blocked_clients") == "2")
    async with asyncio.timeout(10):
        loaded = await asyncio.gather(*(patient.load(f"n{n}") for n in range(20)))
    assert not any(call.done() for call in waiting)
    assert [record.data for record in loaded] == [b"x"] * 20  # type: ignore[union-attr]
    replica.signal(signal.SIGCONT)
    assert await asyncio.gather(*waiting) == [Committed()] * 20


async def test_calls_share_a_wait(patient: ValkeyStore, primary: Server) -> None:
    records = [await created(patient, f"n{n}") for n in range(100)]
    before = primary.admin.info("commandstats")["cmdstat_wait"]["calls"]
    calls = [patient.commit(f"n{n}", each.stamp, after(each, b"x"), [receipt()]) for n, each in enumerate(records)]
    assert await asyncio.gather(*calls) == [Committed()] * 100
    assert primary.admin.info("commandstats")["cmdstat_wait"]["calls"] - before <= 10


async def test_a_replica_that_comes_back_is_enough(hasty: ValkeyStore, primary: Server, replica: Server) -> None:
    deadline = time.monotonic() + 30
    record = await created(hasty, "a")
    replica.kill()
    with pytest.raises(StoreError, match="0 of 1 replicas"):
        await hasty.commit("a", record.stamp, None, [receipt()])
    replica.start()
    key = receipt()
    while True:
        try:
            assert await hasty.commit("a", record.stamp, None, [key]) in (Committed(), Duplicates((key,)))
            break
        except StoreError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    wait_for("the replica is in step", lambda: replica.info("master_link_status") == "up")


async def test_a_replica_is_no_primary(replica: Server) -> None:
    with pytest.raises(StoreRefusedError, match="is a replica: the URL must name its primary"):
        await ValkeyStore(replica.url).open()
