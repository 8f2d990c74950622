"""A Cluster whose slots move and whose servers die in the middle of commits. A longer run: BATCHNORM_FAILOVERS=20."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import valkey

from batchnorm_service.store.base import (
    Committed,
    Duplicates,
    Exists,
    Pin,
    Pinned,
    Record,
    StoreError,
    StoreRefusedError,
)
from batchnorm_service.store.valkey.keys import BUCKET_SLOTS, bucket_of
from batchnorm_service.store.valkey.store import ValkeyStore
from store.harness import LIMIT, RECEIPT_SECONDS, after, created, loaded, receipt
from store.valkey_servers import Cluster, Server, cluster, flush, server, wait_for

pytestmark = pytest.mark.anyio
SECONDS = 60.0  # that nothing should take


class Trainer:
    """Commits to one layer as the service's queue does: the same commit again until its outcome is known.

    Attributes:
        acknowledged: how many commits.
        errors: how often the outcome was not known.
        pinned: the records whose pins were acknowledged, by tag: every fifth.
    """

    def __init__(self, store: ValkeyStore, name: str) -> None:
        self.acknowledged = 0
        self.errors: list[str] = []
        self.pinned: dict[str, Record] = {}
        self._store = store
        self._name = name
        self._stop = False

    def stop(self) -> None:
        self._stop = True

    async def run(self) -> Record:
        """The last record that was acknowledged. A commit that was lost after that shows in the next, as a conflict."""
        record = await self._created()
        while not self._stop:
            new, key = after(record, b"%d" % (self.acknowledged + 1)), receipt()
            outcome = await self._insist(lambda: self._store.commit(self._name, record.stamp, new, [key], 2))  # noqa: B023
            assert outcome in (Committed(), Duplicates((key,)))
            record = new
            self.acknowledged += 1
            if self.acknowledged % 5 == 0:
                pin = Pin(f"t{self.acknowledged}", record.stamp.version, b"data")
                outcome = await self._insist(
                    lambda: self._store.pin(self._name, record.stamp, pin.tag, pin.data, 1 << 30)  # noqa: B023
                )
                assert outcome in (Committed(), Pinned(pin))
                self.pinned[pin.tag] = record
        return record

    async def _created(self) -> Record:
        answer = await self._insist(lambda: self._store.create(self._name, b"0", LIMIT))
        if isinstance(answer, Exists):
            return answer.record
        assert isinstance(answer, Record)
        return answer

    async def _insist(self, call: Callable[[], Awaitable[object]]) -> object:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                return await call()
            except StoreError as error:
                assert time.monotonic() < deadline, self.errors[-5:]
                self.errors.append(str(error))
                await asyncio.sleep(0.05)


class Training:
    """Many trainers at once, through stores of their own."""

    def __init__(self, stores: Sequence[ValkeyStore], names: Sequence[str]) -> None:
        self.trainers = [Trainer(stores[number % len(stores)], name) for number, name in enumerate(names)]
        self._names = names
        self._tasks = [asyncio.ensure_future(trainer.run()) for trainer in self.trainers]

    async def progress(self, commits: int = 5) -> None:
        """Return when each has made so many more."""
        goals = [trainer.acknowledged + commits for trainer in self.trainers]
        deadline = time.monotonic() + SECONDS
        while any(trainer.acknowledged < goal for trainer, goal in zip(self.trainers, goals, strict=True)):
            assert time.monotonic() < deadline, [trainer.errors[-3:] for trainer in self.trainers]
            if failed := [task for task in self._tasks if task.done()]:
                await failed[0]
            await asyncio.sleep(0.01)

    async def finish(self, store: ValkeyStore) -> None:
        """Stop, and see that all that was acknowledged is there, once."""
        for trainer in self.trainers:
            trainer.stop()
        for trainer, name, record in zip(self.trainers, self._names, await asyncio.gather(*self._tasks), strict=True):
            assert record.data == b"%d" % trainer.acknowledged
            assert await loaded(store, name) == record
            assert trainer.pinned
            pins = await store.pins(name)
            assert isinstance(pins, tuple)
            assert {pin.tag: pin.version for pin in pins} == {
                tag: pinned.stamp.version for tag, pinned in trainer.pinned.items()
            }
            for tag, pinned in trainer.pinned.items():
                assert await store.load_kept(name, tag) == pinned

    @property
    def errors(self) -> list[str]:
        return [error for trainer in self.trainers for error in trainer.errors]


@pytest.fixture
def calm(valkey_cluster: Cluster) -> Cluster:
    valkey_cluster.settled()
    flush(valkey_cluster.primaries())
    return valkey_cluster


@pytest.fixture(scope="module")
def stormy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that soon gives up servers."""
    with cluster(tmp_path_factory.mktemp("stormy"), node_timeout=1500) as stormy:
        yield stormy


def names_in(bucket: int, count: int) -> list[str]:
    names = (name for number in range(1 << 20) if bucket_of(name := f"layer-{number}") == bucket)
    return [next(names) for _ in range(count)]


async def migrate_by_keys(calm: Cluster, slot: int, source: Server, target: Server) -> None:
    """As `valkey-cli --cluster reshard` does it, also with servers before Valkey 9."""
    target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", calm.id(source))
    source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", calm.id(target))
    while keys := source.command("CLUSTER", "GETKEYSINSLOT", slot, 3):
        source.command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        await asyncio.sleep(0.001)  # let the trainers meet the half of it
    for one in (target, source, *(other for other in calm.primaries() if other not in {target, source})):
        one.command("CLUSTER", "SETSLOT", slot, "NODE", calm.id(target))


async def migrate_at_once(calm: Cluster, slot: int, source: Server, target: Server) -> None:
    """As Valkey 9 does it."""
    try:
        source.command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", calm.id(target))
    except valkey.ResponseError as error:
        if "unknown subcommand" in str(error):
            pytest.skip("this server moves slots key by key only")
        raise
    deadline = time.monotonic() + SECONDS
    while calm.owner(slot) is not target:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("migrate", [migrate_by_keys, migrate_at_once])
async def test_a_slot_that_moves_in_the_middle_of_commits_changes_nothing(
    calm: Cluster, migrate: Callable[[Cluster, int, Server, Server], Awaitable[None]]
) -> None:
    bucket = 7
    slot = BUCKET_SLOTS[bucket]
    names = [*names_in(bucket, 4), *names_in(bucket + 1, 2), *names_in(200, 2)]
    stores = [ValkeyStore(calm.url, RECEIPT_SECONDS, timeout=SECONDS) for _ in range(2)]
    for store in stores:
        await store.open()
    try:
        training = Training(stores, names)
        await training.progress()
        first = calm.owner(slot)
        others = [server for server in calm.primaries() if server is not first]
        for source, target in ((first, others[0]), (others[0], others[1]), (others[1], first)):
            await migrate(calm, slot, source, target)
            await training.progress()
        await training.finish(stores[0])
        assert training.errors == []
        assert [entry.name for entry in await stores[1].list("", "", 100)] == sorted(names)
    finally:
        await asyncio.gather(*(store.close() for store in stores))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_primary_that_dies_in_the_middle_of_commits_takes_nothing_with_it(
    stormy: Cluster, number: signal.Signals
) -> None:
    """With WAIT for the one replica that each primary has, a failover loses nothing that was acknowledged."""
    names = [f"layer-{n}" for n in range(12)]
    options = {"timeout": 1.0, "wait_replicas": 1, "wait_timeout": 0.5}
    stores = [ValkeyStore(stormy.url, RECEIPT_SECONDS, **options) for _ in range(2)]  # type: ignore[arg-type]
    stormy.settled()
    flush(stormy.primaries())
    for store in stores:
        await store.open()
    try:
        training = Training(stores, names)
        for _ in range(int(os.environ.get("BATCHNORM_FAILOVERS", "1"))):
            await training.progress()
            victim = stormy.owner(BUCKET_SLOTS[bucket_of(random.choice(names))])
            heir = stormy.replica(victim)
            before = len(training.errors)
            # What is written from here on does not reach the replica before the primary is gone.
            heir.signal(signal.SIGSTOP)
            victim.command("CLIENT", "KILL", "TYPE", "replica")
            await asyncio.sleep(0.2)
            if number == signal.SIGKILL:
                victim.kill()
            else:
                victim.signal(number)
            heir.signal(signal.SIGCONT)
            await asyncio.to_thread(_promoted, heir)
            if number == signal.SIGKILL:
                victim.begin()
                await asyncio.to_thread(victim.ready)
            else:
                victim.signal(signal.SIGCONT)
            await training.progress()
            assert len(training.errors) > before, "some must have met a dead server"
            await asyncio.to_thread(stormy.settled)
            assert victim.info("role") == "slave"
        await training.finish(stores[0])
    finally:
        for server in stormy.servers:
            server.signal(signal.SIGCONT)
        await asyncio.gather(*(store.close() for store in stores))


def _promoted(heir: Server) -> None:
    deadline = time.monotonic() + SECONDS
    while heir.info("role") != "master":
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def test_half_a_cluster_is_ready_for_its_own_layers(calm: Cluster) -> None:
    store = ValkeyStore(calm.url, timeout=SECONDS)
    await store.open()
    record = await created(store, "a")
    owner = calm.owner(BUCKET_SLOTS[bucket_of("a")])
    other = next(server for server in calm.primaries() if server is not owner)
    hasty = ValkeyStore(calm.url, timeout=0.3)
    await hasty.open()
    try:
        other.signal(signal.SIGSTOP)
        await hasty.ping()
        assert await hasty.load("a") == record
        with pytest.raises(StoreError):
            await hasty.list("", "", 10)
    finally:
        other.signal(signal.SIGCONT)
        await store.close()
        await hasty.close()


async def test_the_wrong_kind_of_url_is_refused(calm: Cluster, valkey_server: Server) -> None:
    with pytest.raises(StoreRefusedError, match="is a node of a cluster: its URL is valkey\\+cluster://"):
        await ValkeyStore(calm.servers[0].url).open()
    with pytest.raises(StoreRefusedError, match="is not in cluster mode: its URL is valkey://"):
        await ValkeyStore(valkey_server.url.replace("valkey:", "valkey+cluster:").removesuffix("/0")).open()


async def test_a_cluster_of_one_that_does_not_know_its_own_name(tmp_path: Path) -> None:
    with server(tmp_path / "alone", cluster_enabled="yes") as alone:
        store = ValkeyStore(alone.url.replace("valkey:", "redis+cluster:").removesuffix("/0"), timeout=SECONDS)
        with pytest.raises(StoreRefusedError, match="some hash slots of the cluster have no owner"):
            await store.open()
        alone.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_for("the cluster is whole", lambda: "cluster_state:ok" in alone.command("CLUSTER", "INFO").decode())
        await store.open()
        record = await created(store, "a")
        assert await store.load("a") == record
        await store.close()


async def test_one_node_of_the_url_is_enough(calm: Cluster) -> None:
    store = ValkeyStore(f"valkey+cluster://127.0.0.1:1,127.0.0.1:{calm.servers[4].port}", timeout=SECONDS)
    await store.open()
    await created(store, "a")
    await store.close()
