"""Which files the SQLite store opens, and in which words it refuses the others."""

# ruff: noqa: ASYNC240 - a test may wait for the disk

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from batchnorm_service.store.base import StoreError, StoreRefusedError
from batchnorm_service.store.sqlite.store import SqliteStore
from store.harness import Sabotaged, child, created

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _backend(anyio_backend: str) -> None:
    pass


async def refusal(store: SqliteStore) -> str:
    with pytest.raises(StoreRefusedError) as refused:
        await store.open()
    with pytest.raises(StoreError):
        await store.ping()
    await store.close()
    return str(refused.value)


async def test_parent_directories_are_made_and_names_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    if Path("/proc/self/fd").exists():
        monkeypatch.setattr(os, "fsync", record)
    store = SqliteStore(tmp_path / "data" / "deep" / "layers.db")
    await store.open()
    await store.close()
    assert store.path.is_file()
    if Path("/proc/self/fd").exists():
        assert set(flushed) == {tmp_path, tmp_path / "data", tmp_path / "data" / "deep"}


async def test_closing_leaves_one_file(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "layers.db")
    await store.open()
    await created(store, "a")
    await store.close()
    assert [each.name for each in tmp_path.iterdir()] == ["layers.db"]


async def test_url_and_path_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = SqliteStore("data/my layers#1.db")
    assert store.path == tmp_path.resolve() / "data" / "my layers#1.db"
    assert store.url == f"sqlite:///{tmp_path.resolve()}/data/my%20layers%231.db"


@pytest.mark.parametrize("other", [True, False], ids=["exclusive", "shared"])
async def test_a_file_held_by_another_store_is_refused_in_words(tmp_path: Path, other: bool) -> None:
    holder = SqliteStore(tmp_path / "layers.db")
    await holder.open()
    try:
        second = SqliteStore(tmp_path / "layers.db", exclusive=other, busy_seconds=0)
        assert "layers.db is in use by another process" in await refusal(second)
        await holder.ping()
        await created(holder, "a")
    finally:
        await holder.close()
    await second.open()
    await second.close()


async def test_a_file_that_several_share_cannot_be_taken_exclusively(tmp_path: Path) -> None:
    holder = SqliteStore(tmp_path / "layers.db", exclusive=False)
    await holder.open()
    try:
        await created(holder, "a")
        assert "in use by another process" in await refusal(SqliteStore(tmp_path / "layers.db"))
        await created(holder, "b")
    finally:
        await holder.close()


async def test_a_file_held_by_another_process_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    with child("hold", tmp_path / "layers.db") as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "open\n"
        store = SqliteStore(tmp_path / "layers.db")
        assert "in use by another process" in await refusal(store)
        process.kill()
        await asyncio.to_thread(process.wait)
        await store.open()
        await store.close()


async def test_several_may_open_a_new_file_at_the_same_moment(tmp_path: Path) -> None:
    for attempt in range(5):
        stores = [SqliteStore(tmp_path / str(attempt) / "layers.db", exclusive=False) for _ in range(6)]
        await asyncio.gather(*(store.open() for store in stores))
        await asyncio.gather(*(store.ping() for store in stores))
        await asyncio.gather(*(store.close() for store in stores))


async def test_another_process_in_the_way_of_the_write_ahead_log_is_waited_for(
    tmp_path: Path, sabotage: type[Sabotaged]
) -> None:
    """SQLite itself does not wait there: of several that opened a new file at once, some were refused."""
    failures = [2]

    def before(_: sqlite3.Connection, sql: str) -> None:
        if "journal_mode" in sql and failures[0]:
            failures[0] -= 1
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error

    sabotage.before = before
    store = SqliteStore(tmp_path / "layers.db", exclusive=False)
    await store.open()
    await store.close()
    failures[0] = 1
    assert "in use by another process" in await refusal(SqliteStore(tmp_path / "layers.db", busy_seconds=0))


async def test_of_several_that_want_a_new_file_for_themselves_one_gets_it(tmp_path: Path) -> None:
    """Each had begun to read it, so nobody could lock it: all were refused."""
    for attempt in range(5):
        stores = [SqliteStore(tmp_path / str(attempt) / "layers.db") for _ in range(6)]
        answers = await asyncio.gather(*(store.open() for store in stores), return_exceptions=True)
        assert [type(answer) for answer in answers if answer is not None] == [StoreRefusedError] * 5
        await asyncio.gather(*(store.close() for store in stores))


async def test_a_store_that_is_open_cannot_be_opened_again(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "layers.db")
    await store.open()
    try:
        with pytest.raises(StoreError, match="open already"):
            await store.open()
        await store.ping()
    finally:
        await store.close()


async def test_opening_can_be_cancelled(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "layers.db")
    task = asyncio.ensure_future(store.open())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.close()
    await store.open()
    await store.close()


@pytest.mark.parametrize("version", [0, 5, 7])
async def test_a_file_of_a_release_that_is_not_known_is_refused_with_both_versions(
    tmp_path: Path, version: int
) -> None:
    store = SqliteStore(tmp_path / "layers.db")
    await store.open()
    await store.close()
    with closing(sqlite3.connect(store.path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    words = await refusal(store)
    assert f"schema version {version}" in words
    assert "this release knows 4" in words
    assert "the release that wrote the file, or a later one" in words
    assert "--store or BATCHNORM_STORE" in words


@pytest.mark.parametrize("script", ["CREATE TABLE theirs (a)", "PRAGMA application_id = 5", "PRAGMA user_version = 1"])
async def test_another_applications_database_is_refused_and_left_as_it_is(tmp_path: Path, script: str) -> None:
    path = tmp_path / "theirs.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(script)
    before = path.read_bytes()
    assert "is a database of another application" in await refusal(SqliteStore(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello", b"\x00" * 100, b"not SQLite" * 1000])
async def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    assert "is not an SQLite database" in await refusal(SqliteStore(path))
    assert path.read_bytes() == content


async def test_an_empty_file_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "layers.db").touch()
    store = SqliteStore(tmp_path / "layers.db")
    await store.open()
    await created(store, "a")
    await store.close()


async def test_a_directory_or_a_pipe_is_refused(tmp_path: Path) -> None:
    assert "is a directory" in await refusal(SqliteStore(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in await refusal(SqliteStore(tmp_path / "pipe"))
    assert "is not a regular file" in await refusal(SqliteStore("/dev/null"))


async def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be opened" in await refusal(SqliteStore(tmp_path / "file" / "layers.db"))
    assert "cannot be opened" in await refusal(SqliteStore(tmp_path / ("x" * 300) / "layers.db"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_file_or_directory_without_write_permission_is_refused(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "layers.db")
    await store.open()
    await store.close()
    store.path.chmod(0o400)
    assert "cannot be written" in await refusal(store)
    tmp_path.chmod(0o500)
    assert "cannot be written" in await refusal(SqliteStore(tmp_path / "new.db"))
    tmp_path.chmod(0o700)


async def test_what_the_system_says_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written; the service needs permission" in await refusal(SqliteStore(tmp_path / "layers.db"))
