"""A SQLite file that is deleted, moved or replaced while it is open: nothing more is acknowledged.

Seen: batches were acknowledged, the service called itself ready, and all was gone after a restart.
"""

# ruff: noqa: ASYNC240 - a test may wait for the disk

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from batchnorm_client.wire import errors
from batchnorm_service.layers import Layers
from batchnorm_service.store.base import Committed, Missing, Shard, StoreError, StoreLostError, StoreRefusedError
from batchnorm_service.store.sqlite.identity import FileId
from batchnorm_service.store.sqlite.store import SqliteStore
from layers.conftest import CONFIG, batch, evaluate, serving, train
from store.harness import LIMIT, Clocks, Sabotaged, after, created, loaded, receipt

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.name == "nt", reason="Windows does not let an open file be deleted or replaced"),
]


class Monotonic:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "layers.db"


@pytest.fixture
def clock() -> Monotonic:
    return Monotonic()


@pytest.fixture(params=[True, False], ids=["exclusive", "shared"])
async def store(
    request: pytest.FixtureRequest, anyio_backend: str, path: Path, clock: Monotonic
) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, exclusive=request.param, runtime=Clocks(now=clock))
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def alone(anyio_backend: str, path: Path, clock: Monotonic) -> AsyncIterator[SqliteStore]:
    """An exclusive one."""
    store = SqliteStore(path, runtime=Clocks(now=clock))
    await store.open()
    yield store
    await store.close()


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    shutil.copyfile(path, other := path.with_name("other"))
    other.replace(path)


def move(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


def swap(path: Path) -> None:
    move(path)
    shutil.copytree(path.parent.with_name("moved"), path.parent)


def delete_log(path: Path) -> None:
    Path(f"{path}-wal").unlink()


def replace_log(path: Path) -> None:
    replace(Path(f"{path}-wal"))


def link(path: Path) -> None:
    """A restart would look for the log beside the file that the link leads to."""
    path.rename(moved := path.with_name("moved.db"))
    path.symlink_to(moved)


def link_log(path: Path) -> None:
    link(Path(f"{path}-wal"))


LOSSES = [delete, replace, move, swap, link, delete_log, replace_log, link_log]
Lose = Callable[[Path], None]
each_loss = pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)


# ------------------------------------------------------------------------------------------------------- it is noticed


@each_loss
async def test_no_commit_is_acknowledged_when_the_last_check_is_a_second_old(
    store: SqliteStore, path: Path, clock: Monotonic, lose: Lose
) -> None:
    record = await created(store, "a")
    lose(path)
    clock.now += 1
    with pytest.raises(StoreLostError, match="deleted, moved or replaced"):
        await store.commit("a", record.stamp, after(record, b"lost"), [receipt()])


@each_loss
async def test_a_commit_that_took_long_is_checked_after_it(
    store: SqliteStore, path: Path, clock: Monotonic, lose: Lose, sabotage: type[Sabotaged]
) -> None:
    await store.close()
    await store.open()  # with a connection that the test can get in before
    record = await created(store, "a")

    def meanwhile(_: sqlite3.Connection, sql: str) -> None:
        if sql == "COMMIT":
            sabotage.before = None
            lose(path)
            clock.now += 2

    sabotage.before = meanwhile
    with pytest.raises(StoreLostError):
        await store.commit("a", record.stamp, after(record, b"lost"), [receipt()])


@each_loss
async def test_a_ping_always_checks(store: SqliteStore, path: Path, lose: Lose) -> None:
    await store.ping()
    lose(path)
    with pytest.raises(StoreLostError):
        await store.ping()


async def test_shared_memory_that_is_deleted_is_noticed(path: Path, anyio_backend: str) -> None:
    store = SqliteStore(path, exclusive=False)
    await store.open()
    try:
        Path(f"{path}-shm").unlink()
        with pytest.raises(StoreLostError):
            await store.ping()
    finally:
        await store.close()


async def test_a_symbolic_link_that_leads_elsewhere_is_noticed(tmp_path: Path, anyio_backend: str) -> None:
    """A restart would follow it."""
    for name in ("one", "two"):
        store = SqliteStore(tmp_path / name / "layers.db")
        await store.open()
        await store.close()
    link = tmp_path / "current"
    link.symlink_to("one")
    store = SqliteStore(link / "layers.db")
    await store.open()
    try:
        await store.ping()
        link.unlink()
        link.symlink_to("two")
        with pytest.raises(StoreLostError):
            await store.ping()
    finally:
        await store.close()


async def test_every_call_fails_from_then_on_until_the_store_is_opened_again(
    store: SqliteStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = await created(store, "a")
    made, exclusive = record.stamp.incarnation, store.exclusive
    shutil.copyfile(path, kept := path.with_name("kept"))
    path.unlink()

    async def receipts() -> None:
        async for _ in store.receipts():
            pass

    calls: list[Callable[[], Any]] = [
        store.ping,
        lambda: store.load("a"),
        lambda: store.create("b", b"", LIMIT),
        lambda: store.commit("a", record.stamp, None, [receipt()]),
        lambda: store.find_receipts("a", made, [bytes(16)]),
        lambda: store.delete("a", record.stamp),
        lambda: store.join("a", made, bytes(16), 1, Shard(bytes(16), bytes(16), b"")),
        lambda: store.leave("a", made, bytes(16), None),
        lambda: store.list("", "", 10),
        lambda: store.import_receipts("a", made, []),
        receipts,
    ]
    for call in calls:
        with pytest.raises(StoreLostError):
            await call()
        assert not store.exclusive, "what was read before may not be the truth any more"
    kept.rename(path)  # not the file that was open, even if it has the name again
    with pytest.raises(StoreLostError):
        await store.load("a")
    assert [each.levelname for each in caplog.records if "was deleted" in each.message] == ["ERROR"], "once"
    await store.close()
    await store.open()
    assert store.exclusive == exclusive
    await store.ping()


async def test_a_file_that_cannot_be_looked_at_acknowledges_nothing_and_is_not_lost(
    store: SqliteStore, path: Path, clock: Monotonic, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, new, key = await created(store, "a"), None, receipt()
    with monkeypatch.context() as patch:
        lstat = os.lstat

        def refuse(name: Any, **options: Any) -> os.stat_result:
            if str(name).startswith(str(path)):
                raise PermissionError(13, "Permission denied")
            return lstat(name, **options)

        patch.setattr(os, "lstat", refuse)
        clock.now += 1
        with pytest.raises(StoreError, match="cannot be checked: Permission denied") as failed:
            await store.commit("a", record.stamp, new, [key])
        assert not isinstance(failed.value, StoreLostError)
    assert await store.commit("a", record.stamp, new, [key]) == Committed()


async def test_within_a_second_files_are_not_looked_at_again(
    store: SqliteStore, clock: Monotonic, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    lstat = os.lstat

    def count(name: Any, **options: Any) -> os.stat_result:
        looked.append(str(name))
        return lstat(name, **options)

    record = await created(store, "a")
    monkeypatch.setattr(os, "lstat", count)
    for _ in range(20):
        record, old = after(record, b"next"), record
        assert await store.commit("a", old.stamp, record, [receipt()]) == Committed()
    assert looked == []
    clock.now += 1
    assert await store.commit("a", record.stamp, None, [receipt()]) == Committed()
    files = {"layers.db", "layers.db-wal"} if store.exclusive else {"layers.db", "layers.db-wal", "layers.db-shm"}
    assert {Path(name).name for name in looked} >= files


# ------------------------------------------------------------------------------------ and what is there is left alone


async def test_the_file_that_is_there_instead_is_left_alone(store: SqliteStore, path: Path) -> None:
    await created(store, "old")
    path.unlink()
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    other = SqliteStore(path)
    await other.open()
    record = await created(other, "new")
    with pytest.raises(StoreLostError):
        await store.ping()
    await store.close()
    record, old = after(record, b"second"), record
    assert await other.commit("new", old.stamp, record, []) == Committed()
    for suffix in ("", "-wal"):  # as after kill -9
        shutil.copyfile(f"{path}{suffix}", f"{path}.killed{suffix}")
    await other.close()
    reader = SqliteStore(f"{path}.killed")
    await reader.open()
    assert await loaded(reader, "new") == record
    assert await reader.load("old") == Missing()
    await reader.close()


async def test_a_log_that_was_deleted_is_copied_into_the_file_before_anything_is_killed(
    alone: SqliteStore, path: Path
) -> None:
    record = await created(alone, "a")
    delete_log(path)
    with pytest.raises(StoreLostError):
        await alone.ping()
    shutil.copyfile(path, killed := path.with_name("killed.db"))
    reader = SqliteStore(killed)
    await reader.open()
    assert await loaded(reader, "a") == record
    await reader.close()


async def test_the_log_of_a_replaced_file_is_not_played_into_its_successor(alone: SqliteStore, path: Path) -> None:
    """SQLite would take any log of that name for the file's own."""
    backup = SqliteStore(path.with_name("backup.db"))
    await backup.open()
    kept = await created(backup, "kept")
    await backup.close()
    for n in range(20):
        await created(alone, f"n{n}", bytes(5000))
    backup.path.rename(path)
    with pytest.raises(StoreLostError):
        await alone.ping()
    for suffix in ("", "-wal"):  # as after kill -9
        if Path(f"{path}{suffix}").exists():
            shutil.copyfile(f"{path}{suffix}", f"{path}.killed{suffix}")
    reader = SqliteStore(f"{path}.killed")
    await reader.open()
    assert [entry.name for entry in await reader.list("", "", 100)] == ["kept"]
    assert await loaded(reader, "kept") == kept
    await reader.close()


# ----------------------------------------------------------------------------------------------- only the expected file


@each_loss
async def test_a_store_that_expects_a_file_opens_no_other_and_makes_none(
    path: Path, lose: Lose, anyio_backend: str
) -> None:
    first, second = SqliteStore(path, exclusive=False), SqliteStore(path, exclusive=False)
    await first.open()
    try:
        second.files.expected = first.files.ids
        await second.open()
        await second.close()
        lose(path)
        there = sorted(path.parent.rglob("*"))
        with pytest.raises(StoreRefusedError, match="is not the file that the service was started with"):
            await second.open()
        assert sorted(path.parent.rglob("*")) == there
    finally:
        await second.close()
        await first.close()


async def test_a_file_that_is_replaced_while_it_is_opened_is_refused(
    path: Path, sabotage: type[Sabotaged], anyio_backend: str
) -> None:
    def meanwhile(_: sqlite3.Connection, sql: str) -> None:
        sabotage.before = None
        replace(path)

    store = SqliteStore(path)
    await store.open()
    await store.close()
    sabotage.before = meanwhile
    with pytest.raises(StoreRefusedError, match="was replaced while it was opened"):
        await store.open()
    await store.close()
    assert FileId(path.stat().st_dev, path.stat().st_ino) not in store.files.ids


# ------------------------------------------------------------------------------------------------------- through layers


async def _all_refused(layers: Layers) -> None:
    for call in (
        layers.ping,
        lambda: evaluate(layers, "a", batch(1)),
        lambda: train(layers, "a", batch(2), "key"),
        lambda: train(layers, "a", batch(2)),
        lambda: layers.get("a"),
        lambda: layers.list("", "", 10),
        lambda: layers.create("b", CONFIG),
        lambda: layers.reset("a", "all", "other", None),
        lambda: layers.delete("a", None),
    ):
        with pytest.raises(errors.StoreUnavailable):
            async with asyncio.timeout(60):  # there is nothing to wait for: none goes on trying until its deadline
                await call()


async def test_evals_are_not_answered_from_the_cache_and_nothing_waits(
    path: Path, clock: Monotonic, anyio_backend: str
) -> None:
    async with serving(SqliteStore(path, runtime=Clocks(now=clock)), store_timeout=3600) as layers:
        await layers.create("a", CONFIG)
        await train(layers, "a", batch(1))
        await evaluate(layers, "a", batch(1))
        delete(path)
        clock.now += 1
        with pytest.raises(errors.StoreUnavailable):
            await train(layers, "a", batch(2))
        await _all_refused(layers)
