"""WAIT: what is acknowledged is on the replicas, and a replay is no way around that."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from batchnorm_service.store.base import Committed, Duplicates, Exists, Missing, StoreError, StoreRefusedError
from batchnorm_service.store.valkey import ValkeyStore
from batchnorm_service.store.valkey_keys import Keys
from store.harness import LIMIT, RECEIPT_SECONDS, after, created, receipt
from store.valkey_servers import Server, flush, replicated, wait_for

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


async def test_what_is_acknowledged_is_on_the_replica(patient: ValkeyStore, replica: Server) -> None:
    record = await created(patient, "a")
    key = Keys("bn").record("a")
    for n in range(200):
        record, old = after(record, b"%d" % n), record
        assert await patient.commit("a", old.stamp, record, [receipt()]) == Committed()
        assert replica.admin.get(key)[24:] == record.data
    assert await patient.delete("a", record.stamp) == Committed()
    assert replica.admin.get(key) is None


async def test_nothing_is_acknowledged_without_the_replica_and_no_replay_either(
    patient: ValkeyStore, hasty: ValkeyStore, replica: Server
) -> None:
    """Seen: WAIT on another connection, or after a script that wrote nothing, returns at once and says nothing."""
    first = await created(patient, "a")
    gone = await created(patient, "gone")
    second, key = after(first, b"second"), receipt()
    replica.signal(signal.SIGSTOP)
    for _ in range(3):
        for call in (
            hasty.commit("a", first.stamp, second, [key]),
            hasty.create("new", b"new", LIMIT),
            hasty.delete("gone", gone.stamp),
        ):
            with pytest.raises(StoreError, match=r"0 of 1 replicas have it after 0\.05 s"):
                await call
    assert await hasty.load("a") == second, "reads go on, and see what is not acknowledged"

    another = ValkeyStore(hasty.url, wait_replicas=1, wait_timeout=0.05)  # on connections that never wrote
    await another.open()
    with pytest.raises(StoreError, match="0 of 1 replicas"):
        await another.commit("a", first.stamp, second, [key])
    with pytest.raises(StoreError, match="0 of 1 replicas"):
        await another.create("new", b"new", LIMIT)
    await another.close()

    waiting = asyncio.ensure_future(patient.commit("a", first.stamp, second, [key]))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    replica.signal(signal.SIGCONT)
    assert await waiting == Duplicates((key,))
    new = await patient.create("new", b"new", LIMIT)
    assert isinstance(new, Exists)
    assert await patient.delete("gone", gone.stamp) == Missing()
    assert await patient.load("new") == new.record


async def test_reads_do_not_stand_behind_writes_that_wait(patient: ValkeyStore, replica: Server) -> None:
    records = [await created(patient, f"n{n}") for n in range(20)]
    replica.signal(signal.SIGSTOP)
    waiting = [
        asyncio.ensure_future(patient.commit(f"n{n}", record.stamp, after(record, b"x"), [receipt()]))
        for n, record in enumerate(records)
    ]
    await asyncio.sleep(0.1)  # they are on their way
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
