"""Files of every released layout are opened, upgraded and used. `layouts/make.py` made them with those releases."""

# ruff: noqa: ASYNC240 - a test may wait for the disk

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm_client.wire import errors
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.layers import DriftOptions, GroupCall
from batchnorm_service.store.base import Missing, StoreRefusedError
from batchnorm_service.store.sqlite.file import SCHEMA_VERSION
from batchnorm_service.store.sqlite.store import SqliteStore
from batchnorm_service.transfer import migrate
from layers.conftest import evaluate, serving, train
from store.harness import Sabotaged, created, loaded
from store.test_transfer import command

pytestmark = pytest.mark.anyio

LAYOUTS = Path(__file__).parent / "layouts"
FIRST = "1-e36fc35"  # receipts without payloads, no shards
PAYLOADS = "1-a70aadd"  # receipts with payloads, no shards
SHARDS = ["1-cac93be", "1-85768cf"]  # both: the first and the last release of that layout
SECOND = "2-9a0a345"
THIRD = "3-6a7a5f4"
OLD = [FIRST, PAYLOADS, *SHARDS, SECOND, THIRD]
PRESENT = "4-ac52441"
ALL = [*OLD, PRESENT]
COPY = "layers.db.schema-1.backup"


def _made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_layouts", LAYOUTS / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE: Any = _made()


@pytest.fixture
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one of the files."""
    path = tmp_path / "layers.db"
    shutil.copyfile(LAYOUTS / f"{request.param}.sqlite3", path)
    return path


def every(*layouts: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", layouts, indirect=True)


def rows(path: Path, table: str, columns: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return sorted(connection.execute(f"SELECT {columns} FROM {table}"))


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with closing(sqlite3.connect(path)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {name: rows(path, name, "*") for name in tables}


def tables(path: Path) -> set[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as connection:
        return {
            (name, " ".join((sql or "").split()))
            for name, sql in connection.execute("SELECT name, sql FROM sqlite_master")
        }


# ------------------------------------------------------------------------------------------------- what is in the file


@every(*ALL)
async def test_all_rows_are_there_and_the_tables_are_those_of_a_new_file(path: Path, tmp_path: Path) -> None:
    old = contents(path)
    receipts = "incarnation, key, fingerprint, version, batch, expires"
    kept = rows(path, "receipts", receipts)
    payloads = rows(path, "receipts", "key, payload") if path_has_payloads(path) else None
    assert len(kept) >= 7
    store = SqliteStore(path)
    await store.open()
    await store.close()
    assert version(path) == SCHEMA_VERSION
    assert rows(path, "receipts", receipts) == kept
    assert rows(path, "receipts", "key, payload") == (payloads or sorted((key, b"") for _, key, *_ in kept))
    expiries = [expires for (_, expires) in rows(path, "receipts", "id, expires")]
    assert expiries == sorted(expiries), "new rows stand behind those that expire before"
    for table in ("layers", "meta", "shards"):
        assert contents(path)[table] == old.get(table, [])
    new = SqliteStore(tmp_path / "new.db")
    await new.open()
    await new.close()
    assert tables(path) == tables(new.path)


def path_has_payloads(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as connection:
        return "payload" in [name for _, name, *_ in connection.execute("PRAGMA table_info(receipts)")]


@every(*ALL)
async def test_training_goes_on_and_old_keys_are_replayed(path: Path) -> None:
    module = nn.BatchNorm1d(3)
    async with serving(SqliteStore(path)) as layers:
        outputs = [module(torch.tensor(batch)).detach().numpy() for batch in MADE.BATCHES]
        snapshot = await layers.get("moving")
        assert snapshot.num_batches_tracked == 4
        assert np.array_equal(snapshot.tensors["running_mean"].numpy(), module.running_mean.numpy())
        for n, batch in enumerate(MADE.BATCHES[:3], 1):
            again = await train(layers, "moving", np.array(batch, np.float32), f"old-{n}")
            assert (again.replayed, again.version, again.num_batches_tracked) == (True, n + 1, n)
            assert np.array_equal(again.output.numpy(), outputs[n - 1])
        with pytest.raises(errors.IdempotencyKeyReused):
            await train(layers, "moving", np.array(MADE.BATCHES[3], np.float32), "old-1")
        new = np.array([[1, 2, 3], [4, 5, 7]], np.float32)
        module(torch.from_numpy(new))
        trained = await train(layers, "moving", new, "new")
        assert (trained.replayed, trained.version, trained.num_batches_tracked) == (False, 6, 5)
        assert np.array_equal((await layers.get("moving")).tensors["running_mean"].numpy(), module.running_mean.numpy())


@every(*ALL)
async def test_versions_of_a_deleted_layer_do_not_come_again(path: Path) -> None:
    async with serving(SqliteStore(path)):
        pass
    store = SqliteStore(path)
    await store.open()
    try:
        assert await store.load("gone") == Missing()
        assert (await created(store, "gone")).stamp.version == 5
    finally:
        await store.close()


@every(PAYLOADS, *SHARDS, SECOND, THIRD, PRESENT)
async def test_population_statistics_are_exact(path: Path, request: pytest.FixtureRequest) -> None:
    samples = np.array(MADE.SHARDS[0])
    async with serving(SqliteStore(path)) as layers:
        again = await train(layers, "population", samples.astype(np.float32), "population")
        assert (again.replayed, again.num_batches_tracked) == (True, 1)
        tensors = (await layers.get("population")).tensors
        if PAYLOADS not in request.node.name:
            count, mean, var = (np.array(MADE.MOMENTS[name]) for name in ("count", "mean", "var"))
            other = mean + np.sqrt(1.5 * var) * np.array([[-1.0], [0.0], [1.0]])  # three such samples
            assert np.allclose([other.mean(0), other.var(0)], [mean, var])
            assert len(other) == count
            samples = np.concatenate([samples, other])
            wire = {
                "count": Tensor.of(np.array(3, np.int64)),
                "mean": Tensor.of(np.array(MADE.MOMENTS["mean"])),
                "var": Tensor.of(np.array(MADE.MOMENTS["var"])),
            }
            folded = await layers.batches.fold_moments("population", lambda _: wire, "moments")
            assert (folded.replayed, folded.num_batches_tracked) == (True, 2)
        assert np.allclose(tensors["running_mean"].numpy(), samples.mean(0), rtol=1e-6)
        assert np.allclose(tensors["running_var"].numpy(), samples.var(0, ddof=1), rtol=1e-6)


@every(*SHARDS, SECOND, THIRD, PRESENT)
async def test_members_of_old_groups_get_their_answers_and_open_groups_are_completed(
    path: Path, request: pytest.FixtureRequest
) -> None:
    shards = [np.array(shard, np.float32) for shard in MADE.SHARDS]
    expected = nn.BatchNorm1d(2)(torch.from_numpy(np.concatenate(shards))).detach().numpy()
    async with serving(SqliteStore(path)) as layers:
        outputs = []
        for n, shard in enumerate(shards, 1):
            again = await train(layers, "grouped", shard, f"member-{n}", group=GroupCall("closed", 2))
            assert (again.replayed, again.num_batches_tracked) == (True, 1)
            outputs.append(again.output.numpy())
        assert np.allclose(np.concatenate(outputs), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(errors.GroupClosed):
            await train(layers, "grouped", shards[1], "member-3", group=GroupCall("closed", 2))
        wire = {"input": Tensor.of(shards[0]), "grad_output": Tensor.of(np.eye(2, dtype=np.float32))}
        group = GroupCall("closed", 1)
        gradients = await layers.batches.backward("grouped", lambda _: wire, "member-1", training=True, group=group)
        assert gradients.replayed

        member = "open" if any(each in request.node.name for each in (THIRD, PRESENT)) else "member"
        completed = await train(layers, "grouped", shards[1], f"{member}-2", group=GroupCall("open", 2))
        assert (completed.replayed, completed.num_batches_tracked) == (False, 2)
        assert np.allclose(completed.output.numpy(), expected[2:], rtol=1e-5, atol=1e-6)
        first = await train(layers, "grouped", shards[0], f"{member}-1", group=GroupCall("open", 2))
        assert np.allclose(first.output.numpy(), expected[:2], rtol=1e-5, atol=1e-6)
        assert (first.replayed, first.num_batches_tracked) == (True, 2)


@every(PRESENT)
async def test_drift_goes_on(path: Path) -> None:
    """The next schema's step must keep it."""
    async with serving(SqliteStore(path), drift=DriftOptions()) as layers:
        before = (await layers.drift.read("moving")).drift
        assert before.batches >= 1
        await evaluate(layers, "moving", np.array(MADE.BATCHES[0], np.float32))
        assert (await layers.drift.read("moving")).drift.batches == before.batches + 1


@every(THIRD, PRESENT)
async def test_history_and_pins_are_served_as_they_were(path: Path) -> None:
    """Bit by bit, and rollback goes on from them."""
    module, states = nn.BatchNorm1d(3), []
    for batch in (None, *MADE.BATCHES[:2]):
        if batch is not None:
            module(torch.tensor(batch))
        states.append({name: value.numpy().tobytes() for name, value in module.state_dict().items()})
    empty, first, second = states
    async with serving(SqliteStore(path)) as layers:
        digests = {}
        for at, tensors in {
            None: first,
            "first": first,
            "empty": empty,
            8: empty,
            7: second,
            6: first,
            5: empty,
        }.items():
            found = await layers.get("history", at)
            assert {name: value.numpy().tobytes() for name, value in found.tensors.items()} == tensors, at
            digests[found.version] = found.digest
        history = (await layers.history.list("history", 10, None)).history
        operations = ["rollback", "reset", "train", "train", "create"]
        assert [(entry.version, entry.operation) for entry in history] == [
            *zip((9, 8, 7, 6, 5), operations, strict=True)
        ]
        assert {entry.version: entry.digest for entry in history} == digests
        pins = (await layers.history.pins("history")).pins
        assert [(pin.tag, pin.version, pin.digest) for pin in pins] == [
            ("empty", 8, digests[8]),
            ("first", 6, digests[6]),
        ]
        assert (await layers.rollback("history", "first", "back", None))[1], "a repeat"
        layer, _ = await layers.rollback("history", 7, None, None)
        assert (layer.version, layer.num_batches_tracked, layer.digest) == (10, 2, digests[7])


@every(FIRST)
def test_the_command_moves_an_old_file(path: Path) -> None:
    done = command("--from", f"sqlite:///{path}", "--to", f"sqlite:///{path.with_name('target.db')}")
    assert done.returncode == 0, done.stderr
    assert "2 layers copied" in done.stdout
    assert COPY in done.stderr, "whoever runs it is told of the copy"


@every(*ALL)
async def test_an_old_file_is_moved_to_another_store(path: Path, tmp_path: Path) -> None:
    layers, receipts = rows(path, "layers", "name, incarnation, data"), rows(path, "receipts", "incarnation, key")
    target = SqliteStore(tmp_path / "target.db")
    report = await migrate(SqliteStore(path), target, lambda *_: None)
    held = {incarnation for _, incarnation, _ in layers}
    assert report.complete
    assert (report.copied, report.receipts) == (len(layers), sum(each in held for each, _ in receipts))
    await target.open()
    try:
        assert [(await loaded(target, name)).data for name, _, _ in layers] == [data for _, _, data in layers]
    finally:
        await target.close()


# -------------------------------------------------------------------------------- how it is upgraded


async def names_after_start(path: Path, *, exclusive: bool = True) -> set[str]:
    """What is in the directory after the file was opened and closed."""
    store = SqliteStore(path, exclusive=exclusive)
    await store.open()
    await store.close()
    return {each.name for each in path.parent.iterdir()}


@every(*OLD)
@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "shared"])
async def test_a_copy_of_the_file_as_it_was_lies_beside_it(path: Path, exclusive: bool) -> None:
    before, old = contents(path), version(path)
    path.chmod(0o640)
    copy = path.with_name(f"layers.db.schema-{old}.backup")
    assert await names_after_start(path, exclusive=exclusive) == {"layers.db", copy.name}
    assert version(copy) == old
    assert contents(copy) == before
    assert stat.S_IMODE(copy.stat().st_mode) == 0o640, "no more may read it than the file itself"
    assert await names_after_start(path, exclusive=exclusive) == {"layers.db", copy.name}, "nothing more to upgrade"


@every(FIRST)
async def test_no_copy_is_ever_overwritten(path: Path) -> None:
    old, copies = path.read_bytes(), [COPY, f"{COPY}-2", f"{COPY}-3"]
    path.with_name(COPY).write_bytes(b"mine")
    path.with_name("layers.db.schema-1.partial").write_bytes(b"of an upgrade that was killed")
    for count in (2, 3):
        path.write_bytes(old)
        assert await names_after_start(path) == {"layers.db", *copies[:count]}
    assert path.with_name(COPY).read_bytes() == b"mine"
    assert contents(path.with_name(copies[1])) == contents(path.with_name(copies[2]))


@every(FIRST)
async def test_the_copy_is_on_the_disk_before_the_file_is_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch, sabotage: type[Sabotaged]
) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("which file is flushed is seen in Linux's /proc")
    done: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    sabotage.before = lambda _, sql: done.append(sql) if sql.startswith("ALTER") else None
    await names_after_start(path)
    partial, directory, alter = (done.index(each) for each in ("layers.db.schema-1.partial", path.parent.name, done[2]))
    assert partial < directory < alter
    assert done[alter].startswith("ALTER")


async def _refusal(path: Path) -> str:
    store = SqliteStore(path)
    with pytest.raises(StoreRefusedError) as refused:
        await store.open()
    await store.close()
    return str(refused.value)


@pytest.mark.slow
@every(*OLD)
async def test_whatever_fails_or_is_killed_in_the_middle_leaves_the_file_as_it_was(
    path: Path, tmp_path: Path, sabotage: type[Sabotaged]
) -> None:
    """At each statement once an error, and once what a `kill -9` would leave: the files at that moment."""
    old, before, schema = path.read_bytes(), contents(path), version(path)
    counted: list[str] = []
    fail_at = [-1]

    def get_in(_: sqlite3.Connection, sql: str) -> None:
        if sql == "BEGIN IMMEDIATE" or counted:
            counted.append(sql)
            left = path.parent / "killed" / str(len(counted))
            left.mkdir(parents=True, exist_ok=True)
            for each in path.parent.glob("layers.db*"):
                shutil.copyfile(each, left / each.name)
        if len(counted) == fail_at[0]:
            sabotage.before = None
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error

    sabotage.before = get_in
    await names_after_start(path)
    sabotage.before = None
    statements = [*counted]
    upgrading = [n for n, sql in enumerate(statements, 1) if sql == "BEGIN IMMEDIATE"][1]
    committing = next(n for n, sql in enumerate(statements, 1) if n > upgrading and sql == "COMMIT")
    assert committing - upgrading >= {1: 6, 2: 4, 3: 3}[schema]

    for number in range(1, committing + 1):
        left = path.parent / "killed" / str(number)
        shutil.copytree(left, again := tmp_path / f"again-{number}")
        assert contents(left / path.name) == before, statements[number - 1]
        assert version(left / path.name) == schema
        await names_after_start(again / path.name)
        assert version(again / path.name) == SCHEMA_VERSION, statements[number - 1]

    upgraded = contents(path)
    for number in range(1, committing + 1):
        for each in path.parent.glob("layers.db*"):
            each.unlink()
        path.write_bytes(old)
        counted.clear()
        fail_at[0] = number
        sabotage.before = get_in
        words = await _refusal(path)
        assert "disk I/O error" in words, statements[number - 1]
        if number >= upgrading:
            assert f"cannot be upgraded from schema version {schema}" in words
        assert contents(path) == before
        assert version(path) == schema
    assert not list(path.parent.glob("*.partial"))
    await names_after_start(path)
    assert contents(path) == upgraded


@every(FIRST)
async def test_a_file_that_another_process_has_open_is_not_upgraded(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM meta").fetchall()
        for exclusive in (True, False):
            store = SqliteStore(path, exclusive=exclusive, busy_seconds=0.01)
            with pytest.raises(StoreRefusedError, match="in use by another process"):
                await store.open()
            await store.close()
    assert version(path) == 1
    assert {each.name for each in path.parent.iterdir()} == {"layers.db"}


@every(FIRST, SECOND)
async def test_tables_that_no_release_made_are_refused_and_not_copied(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE receipts ADD COLUMN other")
        connection.commit()
    before = contents(path)
    words = f"cannot be upgraded from schema version {version(path)}: no release made a file with these tables"
    assert words in await _refusal(path)
    assert contents(path) == before
    assert {each.name for each in path.parent.iterdir()} == {"layers.db"}


@every(FIRST)
async def test_no_room_for_the_copy_is_said_and_nothing_is_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", rename)
    before = path.read_bytes()
    assert "cannot be upgraded from schema version 1: [Errno 28] No space left on device" in await _refusal(path)
    assert {each.name for each in path.parent.iterdir()} == {"layers.db"}
    assert contents(path)
    assert path.read_bytes() == before
