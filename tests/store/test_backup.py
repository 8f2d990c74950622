"""Backups of every store that outlives its process, and restoring them."""

# ruff: noqa: ASYNC240 - a test may wait for the disk

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sqlite3
import stat
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from batchnorm_service.backup import backup, restore
from batchnorm_service.settings import Settings
from batchnorm_service.store.base import (
    Committed,
    Record,
    Store,
    StoreDamagedError,
    StoreError,
    StoreLostError,
    StoreRefusedError,
)
from batchnorm_service.store.sqlite import backup_socket
from batchnorm_service.store.sqlite.backup_socket import request_backup
from batchnorm_service.store.sqlite.copies import CopyProgress
from batchnorm_service.store.sqlite.store import SqliteStore
from batchnorm_service.store.valkey.store import ValkeyStore
from batchnorm_service.transfer import Report, store_to_move
from store.harness import Sabotaged, after, created, loaded, receipt
from store.test_transfer import all_receipts, expect_history, filled, silent, with_history
from store.valkey_servers import Server, flush

pytestmark = pytest.mark.anyio


def moved(path: Path, *, target: bool = False) -> Store:
    return store_to_move(f"sqlite:///{path}", Settings(), target=target)


async def back_up(path: Path, file: Path) -> None:
    """In a thread, as the store that is open belongs to this loop."""
    assert await asyncio.to_thread(backup, moved(path), file, silent) is None


def names(directory: Path) -> set[str]:
    return {each.name for each in directory.iterdir()}


def damage(path: Path, page: int = 2) -> None:
    """Overwrite a page of a file, which is not in use."""
    with path.open("r+b") as file:
        file.seek(4096 * (page - 1))
        file.write(b"\xff" * 4096)


@pytest.fixture
async def path(anyio_backend: str, tmp_path: Path) -> Path:
    """A store that is not open."""
    directory = tmp_path / "data"
    store = SqliteStore(directory / "layers.db")
    await store.open()
    await filled(store)
    await with_history(store)
    await store.close()
    return store.path


@pytest.mark.parametrize("how", ["closed", "locked", "shared"])
async def test_a_backup_has_all_that_was_acknowledged_before(path: Path, tmp_path: Path, how: str) -> None:
    store = SqliteStore(path, exclusive=how == "locked")
    await store.open()
    record = await created(store, "new")
    record, old = after(record, b"in the log"), record
    assert await store.commit("new", old.stamp, record, [used := receipt()]) == Committed()
    if how == "closed":
        await store.close()
    path.chmod(0o640)
    file = tmp_path / "backup.db"
    await back_up(path, file)
    if how != "closed":
        assert await store.load("new") == record, "it goes on"
        assert await store.commit("new", record.stamp, after(record, b"later"), []) == Committed()
        await store.close()
    assert names(tmp_path) == {"data", "backup.db"}
    assert names(path.parent) == {"layers.db"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o640, "no more may read it than the store"
    copy = SqliteStore(file)
    await copy.open()
    assert await copy.load("new") == record
    assert used.key in await all_receipts(copy)
    newest = await loaded(copy, "kept")
    await expect_history(copy, newest, [])
    await copy.close()


async def test_commits_between_the_steps_of_a_copy_are_in_it(path: Path, tmp_path: Path) -> None:
    """They do not wait for the copy, also where they change pages that are copied already."""
    store = SqliteStore(path)
    await store.open()
    records = [await created(store, f"big{n}", bytes([n]) * 500_000) for n in range(20)]
    steps, told = threading.Semaphore(0), []

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        assert steps.acquire(timeout=60)

    copying = asyncio.ensure_future(store.copy(tmp_path / "copy.db", progress))
    used = [receipt() for _ in records]
    for n, record in enumerate(records[:10]):
        new = after(record, b"%d" % n * 100_000)
        calls = store.commit(f"big{n}", record.stamp, new, [used[n]], 1), store.load("big19")
        committing = asyncio.gather(*calls)
        await asyncio.sleep(0)
        steps.release()
        assert await committing == [Committed(), records[19]]
        records[n] = new
        assert not copying.done()
    with pytest.raises(StoreError):  # whatever fails does not end up in the copy
        await asyncio.gather(store.commit("big0", records[0].stamp, None, [("no receipt",)]), _release(steps))  # type: ignore[list-item]
    steps.release(1000)
    await copying
    done, total = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[-1]
    await store.close()
    with closing(sqlite3.connect(tmp_path / "copy.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    copy = SqliteStore(tmp_path / "copy.db")
    await copy.open()
    for n, record in enumerate(records):
        assert await copy.load(f"big{n}") == record
    old = await copy.load_kept("big9", 1)
    assert isinstance(old, Record)
    assert old.data == bytes([9]) * 500_000
    assert {each.key for each in used[:10]} <= (await all_receipts(copy)).keys()
    await copy.close()


async def _release(steps: threading.Semaphore) -> None:
    await asyncio.sleep(0)
    steps.release()


async def test_a_backup_takes_the_place_of_an_earlier_one_only(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "backup.db"
    await back_up(path, file)
    first = file.read_bytes()
    store = SqliteStore(path)
    await store.open()
    await created(store, "new")
    await store.close()
    (tmp_path / "backup.db.partial").write_bytes(b"of one that was killed")
    damage(file)
    await back_up(path, file)
    assert file.read_bytes() != first
    mine = tmp_path / "mine.txt"
    mine.write_bytes(b"mine")
    with pytest.raises(StoreRefusedError, match="is not a backup"):
        await back_up(path, mine)
    with pytest.raises(StoreRefusedError, match="is the store itself"):
        await back_up(path, path)
    assert mine.read_bytes() == b"mine"
    assert names(tmp_path) == {"data", "backup.db", "mine.txt"}


async def test_two_backups_to_one_file_at_once(path: Path, tmp_path: Path) -> None:
    """Seen: both failed, as one removed what the other wrote. Backups to other files are not in the way."""
    file = tmp_path / "backup.db"
    (tmp_path / "backup.db.lock").write_bytes(b"")  # of one that was killed
    halfway, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        halfway.set()
        go_on.wait(10)

    first = asyncio.create_task(asyncio.to_thread(backup, moved(path), file, wait))
    try:
        assert await asyncio.to_thread(halfway.wait, 10)
        with pytest.raises(StoreRefusedError, match="is being written by another process"):
            await back_up(path, file)
        await back_up(path, tmp_path / "other.db")
    finally:
        go_on.set()
    await first
    assert names(tmp_path) == {"data", "backup.db", "other.db"}
    assert file.read_bytes() == (tmp_path / "other.db").read_bytes()
    await back_up(path, file)
    assert names(tmp_path) == {"data", "backup.db", "other.db"}


@pytest.mark.parametrize("how", ["closed", "locked"])
async def test_a_backup_that_fails_leaves_the_earlier_one(
    path: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "backup.db"
    await back_up(path, file)
    before = file.read_bytes()
    store = SqliteStore(path)
    if how == "locked":
        await store.open()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("batchnorm_service.store.sqlite.copies.flush", full)
    with pytest.raises(StoreError, match="No space left"):
        await back_up(path, file)
    assert file.read_bytes() == before
    assert names(tmp_path) == {"data", "backup.db"}
    await store.close()


async def test_a_damaged_store_makes_no_backup(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "backup.db"
    await back_up(path, file)
    before = file.read_bytes()
    damage(path, page=5)
    with pytest.raises(StoreDamagedError, match="is damaged"):
        await back_up(path, file)
    assert file.read_bytes() == before


async def test_what_offers_no_backups_is_told(path: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreRefusedError, match="locked by a process that offers no backups"):
            await back_up(path, tmp_path / "backup.db")
    with pytest.raises(StoreRefusedError, match="there is no file"):
        await back_up(tmp_path / "none.db", tmp_path / "backup.db")
    assert names(tmp_path) == {"data"}


async def test_a_store_that_is_closed_stops_its_backup(path: Path, tmp_path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    for n in range(10):
        await created(store, f"big{n}", bytes(1_000_000))
    going, go = threading.Event(), threading.Event()

    def progress(*_: object) -> None:
        going.set()
        assert go.wait(60)

    copying = asyncio.ensure_future(store.copy(tmp_path / "copy.db", progress))
    await asyncio.to_thread(going.wait)
    second = asyncio.ensure_future(store.copy(tmp_path / "second.db", silent_pages))
    await asyncio.sleep(0)  # it is queued
    ended = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(StoreError, match="a copy is being made already"):
        await second
    with pytest.raises(StoreError, match="is being closed"):
        await copying
    await ended
    assert names(tmp_path) == {"data"}
    assert not request_backup(path, tmp_path / "copy.db", silent_pages), "nobody offers it"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract addresses")
def test_who_only_took_the_address_is_not_asked(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word that the backup is complete would be taken, and what it has put there be renamed."""
    monkeypatch.setattr(backup_socket, "_user", lambda _: os.getuid() + 4242)
    monkeypatch.setattr(backup_socket, "_REPLY_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(backup_socket._address(path))
        stranger.listen()
        assert not request_backup(path, tmp_path / "copy.db", silent_pages)


def silent_pages(done: int, total: int) -> None:
    assert done <= total


async def test_a_caller_that_goes_away_stops_its_backup(path: Path, tmp_path: Path) -> None:
    class Slow(SqliteStore):
        """Goes on for ever, unless it is told that nobody waits."""

        async def copy(self, partial: Path, progress: CopyProgress) -> None:
            try:
                while True:
                    progress(1, 2)
                    await asyncio.sleep(0.01)
            finally:
                stopped.set()

    def give_up(*_: object) -> None:
        raise RuntimeError

    stopped = asyncio.Event()
    store = Slow(path)
    await store.open()
    with pytest.raises(RuntimeError):
        await asyncio.to_thread(request_backup, path, tmp_path / "copy.db", give_up)
    await stopped.wait()
    await store.close()


# --------------------------------------------------------------------------------------------------------- restoring


@pytest.mark.parametrize("present", ["nothing", "another", "damaged"])
async def test_a_backup_is_restored(path: Path, tmp_path: Path, present: str) -> None:
    store = SqliteStore(path)
    await store.open()
    records = [await loaded(store, name) for name in ("a", "kept")]
    receipts = {each.receipt for each in (await all_receipts(store)).values()}
    await store.close()
    file = tmp_path / "backup.db"
    await back_up(path, file)
    if present == "nothing":
        shutil.rmtree(path.parent)
    else:
        await store.open()
        await created(store, "later")
        shutil.copyfile(path, tmp_path / "old.db")
        shutil.copyfile(f"{path}-wal", tmp_path / "old.db-wal")
        await store.close()
        for suffix in ("", "-wal"):  # as after a kill: its log must not be applied to the restored file
            shutil.copyfile(tmp_path / f"old.db{suffix}", f"{path}{suffix}")
        if present == "damaged":
            path.write_bytes(b"\xff" * 100_000)
        with pytest.raises(StoreRefusedError, match=r"exists; --overwrite replaces it"):
            restore(moved(path, target=True), file, silent, overwrite=False)
    before = file.read_bytes()
    assert restore(moved(path, target=True), file, silent, overwrite=present != "nothing") is None
    assert file.read_bytes() == before
    assert names(path.parent) == {"layers.db"}
    await store.open()
    assert [await loaded(store, name) for name in ("a", "kept")] == records
    assert [entry.name for entry in await store.list("", "", 10)] == ["a", "kept", "layer1.0.bn1", "zoo"]
    assert {each.receipt for each in (await all_receipts(store)).values()} == receipts
    await store.close()


async def test_a_damaged_backup_is_not_restored(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "backup.db"
    await back_up(path, file)
    before = path.read_bytes()
    with closing(sqlite3.connect(file)) as newer:
        newer.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreRefusedError, match="has schema version 99, and this release knows 4"):
        restore(moved(path, target=True), file, silent, overwrite=True)
    damage(file, page=5)
    with pytest.raises(StoreDamagedError, match=r"backup\.db is damaged"):
        restore(moved(path, target=True), file, silent, overwrite=True)
    file.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(StoreDamagedError, match=r"backup\.db is damaged"):
        restore(moved(path, target=True), file, silent, overwrite=True)
    file.write_bytes(b"no database")
    with pytest.raises(StoreDamagedError, match=r"backup\.db is damaged"):
        restore(moved(path, target=True), file, silent, overwrite=True)
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE theirs (a)")
    with pytest.raises(StoreRefusedError, match="is not a file of this service"):
        restore(moved(path, target=True), tmp_path / "other.db", silent, overwrite=True)
    with pytest.raises(StoreRefusedError, match="there is no file"):
        restore(moved(path, target=True), tmp_path / "none.db", silent, overwrite=True)
    assert path.read_bytes() == before
    assert names(path.parent) == {"layers.db"}


@pytest.mark.parametrize("exclusive", [True, False], ids=["locked", "shared"])
async def test_a_store_in_use_is_not_replaced(path: Path, tmp_path: Path, exclusive: bool) -> None:
    file = tmp_path / "backup.db"
    await back_up(path, file)
    store = SqliteStore(path, exclusive=exclusive)
    await store.open()
    with pytest.raises(StoreRefusedError, match="in use by another process"):
        await asyncio.to_thread(restore, moved(path, target=True), file, silent, overwrite=True)
    await created(store, "later")
    await store.close()
    assert names(path.parent) == {"layers.db"}
    await store.open()
    assert (await loaded(store, "later")).data == b"first"
    await store.close()


async def test_a_store_that_is_opened_while_it_is_replaced_acknowledges_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, store = tmp_path / "backup.db", SqliteStore(path)
    await back_up(path, file)
    replace = Path.replace

    def opened_before(source: Path, target: Path) -> Path:
        asyncio.run_coroutine_threadsafe(store.open(), loop).result()
        return replace(source, target)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(Path, "replace", opened_before)
    await asyncio.to_thread(restore, moved(path, target=True), file, silent, overwrite=True)
    with pytest.raises(StoreLostError):
        await store.ping()
    await store.close()


# ------------------------------------------------------------------------------------------------------------ Valkey


async def test_a_server_is_backed_up_to_a_file_and_restored(valkey_server: Server, tmp_path: Path) -> None:
    flush([valkey_server])
    store = ValkeyStore(valkey_server.url, timeout=30)
    await store.open()
    await filled(store)
    newest, kept = await with_history(store)
    url, file = valkey_server.url, tmp_path / "backup.db"
    for _ in range(2):  # an earlier backup is replaced
        report = await asyncio.to_thread(backup, store_to_move(url, Settings(), target=False), file, silent)
        assert report == Report(copied=4, kept=3, pins=4, receipts=14)
        assert names(tmp_path) == {"backup.db"}
    assert await store.commit("kept", newest.stamp, after(newest, b"later"), []) == Committed()
    target = store_to_move(url, Settings(), target=True)
    report = await asyncio.to_thread(restore, target, file, silent, overwrite=False)
    assert report is not None
    assert (report.present, report.differing) == (3, ["kept"])
    flush([valkey_server])
    before = file.read_bytes()
    assert await asyncio.to_thread(restore, target, file, silent, overwrite=False) == Report(
        copied=4, kept=3, pins=4, receipts=14
    )
    assert file.read_bytes() == before
    await expect_history(store, newest, kept)
    await store.close()


# ------------------------------------------------------------------------------------------------- check at the start


async def test_a_damaged_file_is_refused_at_the_start(path: Path, sabotage: type[Sabotaged]) -> None:
    store = SqliteStore(path, check_bytes=path.stat().st_size)
    await store.open()
    await store.close()
    damage(path, page=5)
    before = path.read_bytes()
    with pytest.raises(StoreDamagedError, match=r"layers\.db is damaged"):
        await store.open()
    await store.close()
    assert path.read_bytes() == before
    statements: list[str] = []
    sabotage.before = lambda _, sql: statements.append(sql)
    large = SqliteStore(path, check_bytes=path.stat().st_size - 1)
    await large.open()
    await large.close()
    assert not [sql for sql in statements if "check" in sql and "checkpoint" not in sql], "it is too large"


async def test_a_damaged_header_is_refused_whatever_the_size(path: Path) -> None:
    damage(path, page=1)
    with pytest.raises(StoreRefusedError, match="is not an SQLite database"):
        await SqliteStore(path).open()
