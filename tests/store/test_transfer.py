"""Moving layers and receipts between stores: what every store does for it, and the command that does it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batchnorm_service.settings import Settings
from batchnorm_service.store.base import (
    Committed,
    Duplicates,
    Missing,
    NotKept,
    Pin,
    ReceiptWithTTL,
    Record,
    Stamp,
    Store,
    StoreError,
    StoreRefusedError,
)
from batchnorm_service.store.sqlite.store import SqliteStore
from batchnorm_service.transfer import Report, SameStoreError, migrate, store_to_move
from store import valkey_servers
from store.harness import RECEIPT_SECONDS, SqliteTable, Table, after, created, loaded, receipt

pytestmark = pytest.mark.anyio

NAMES = ("a", "layer1.0.bn1", "zoo")


async def all_receipts(store: Store) -> dict[bytes, ReceiptWithTTL]:
    return {each.receipt.key: each async for page in store.receipts() for each in page}


async def filled(store: Store, count: int = 3) -> dict[str, Record]:
    """Layers with a history: versions above 1, and receipts of which some have payloads."""
    records = {}
    for name in NAMES:
        record = await created(store, name, name.encode())
        for step in range(count):
            new = after(record, f"{name} {step}".encode() * 300)
            assert await store.commit(name, record.stamp, new, [receipt(version=step)]) == Committed()
            record = new
        records[name] = record
    return records


async def with_history(store: Store, name: str = "kept") -> tuple[Record, list[Record]]:
    """A layer with two kept records and three pins: the newest record, and the kept ones."""
    records = [await created(store, name, b"0")]
    for step in range(1, 6):
        records.append(after(records[-1], b"%d" % step * 1000))
        assert await store.commit(name, records[-2].stamp, records[-1], [receipt(version=step)], 2) == Committed()
    for tag, record in (("newest", records[-1]), ("older", records[-3]), ("again", records[-3])):
        assert await store.pin(name, record.stamp, tag, tag.encode(), 9) == Committed()
    newer = after(records[-1], b"newer")
    assert await store.commit(name, records[-1].stamp, newer, [], 1) == Committed()
    assert await store.pin(name, newer.stamp, "very newest", b"", 9) == Committed()
    kept = await store.kept(name)
    assert isinstance(kept, tuple)
    assert [stamp.version for stamp in kept] == [7, 6, 5, 4]
    return newer, records[3:]


async def expect_history(store: Store, newest: Record, kept: list[Record], name: str = "kept") -> None:
    """What `with_history` made."""
    for record in (newest, *kept):
        found = await store.load_kept(name, record.stamp.version)
        assert isinstance(found, Record)
        assert (found.data, found.stamp.version) == (record.data, record.stamp.version)
    pins = [("again", 4, b"again"), ("newest", 6, b"newest"), ("older", 4, b"older"), ("very newest", 7, b"")]
    assert await store.pins(name) == tuple(Pin(*pin) for pin in pins)
    for tag, version, _ in pins:
        found = await store.load_kept(name, tag)
        assert isinstance(found, Record)
        assert found.stamp.version == version


def silent(what: str, done: int, total: int | None) -> None:
    assert total is None or done <= total, what


# ------------------------------------------------------------------------------------------------- every store


async def test_receipts_are_listed_with_their_layer_and_lifetime(table: Table, store: Store) -> None:
    assert await all_receipts(store) == {}
    first, second = await created(store, "a"), await created(store, "r:b")
    old, new, other = receipt(version=1), receipt(), receipt()
    assert await store.commit("a", first.stamp, None, [old]) == Committed()
    table.forward(1000)
    assert await store.commit("a", first.stamp, None, [new]) == Committed()
    assert await store.commit("r:b", second.stamp, None, [other]) == Committed()
    found = await all_receipts(store)
    assert {key: each.receipt for key, each in found.items()} == {each.key: each for each in (old, new, other)}
    assert [found[each.key].incarnation for each in (old, new, other)] == [
        record.stamp.incarnation for record in (first, first, second)
    ]
    assert RECEIPT_SECONDS - 1100 < found[old.key].seconds <= RECEIPT_SECONDS - 999
    assert RECEIPT_SECONDS - 100 < found[new.key].seconds <= RECEIPT_SECONDS + 1
    table.forward(RECEIPT_SECONDS - 999)
    assert (await all_receipts(store)).keys() == {new.key, other.key}


async def test_more_receipts_than_a_page_are_all_listed(store: Store) -> None:
    record = await created(store, "a")
    many = [receipt() for _ in range(2500)]
    for start in range(0, len(many), 500):
        assert await store.commit("a", record.stamp, None, many[start : start + 500]) == Committed()
    assert {each.receipt for each in (await all_receipts(store)).values()} == set(many)


async def test_remembered_receipts_count_as_long_as_they_say(table: Table, store: Store) -> None:
    record = await created(store, "a")
    made = record.stamp.incarnation
    short, long = ReceiptWithTTL(0, receipt(version=1), 500.0), ReceiptWithTTL(0, receipt(), 5000.0)
    assert await store.import_receipts("a", made, [short, long]) == Committed()
    assert await store.load("a") == record, "the record stays as it is"
    assert {each.receipt for each in (await all_receipts(store)).values()} == {short.receipt, long.receipt}
    table.forward(600)
    assert (await all_receipts(store)).keys() == {long.receipt.key}
    assert await store.commit("a", record.stamp, None, [long.receipt]) == Duplicates((long.receipt,))
    assert await store.commit("a", record.stamp, None, [short.receipt]) == Committed()


async def test_a_receipt_that_is_there_stays_as_it_was(store: Store) -> None:
    record = await created(store, "a")
    used = receipt()
    assert await store.commit("a", record.stamp, None, [used]) == Committed()
    other = used._replace(batch=99)
    assert await store.import_receipts("a", record.stamp.incarnation, [ReceiptWithTTL(0, other, 5.0)]) == Committed()
    (found,) = (await all_receipts(store)).values()
    assert found.receipt == used
    assert found.seconds > 1000


async def test_receipts_are_remembered_for_one_incarnation_only(store: Store) -> None:
    record = await created(store, "a")
    lasting = ReceiptWithTTL(0, receipt(), 100.0)
    assert await store.import_receipts("a", record.stamp.incarnation ^ 1, [lasting]) == Missing()
    assert await store.import_receipts("b", record.stamp.incarnation, [lasting]) == Missing()
    assert await all_receipts(store) == {}


# --------------------------------------------------------------------------------------------------- migrations


async def test_layers_and_receipts_move_to_another_store_and_back(table: Table, tmp_path: Path) -> None:
    source = table.store()
    await source.open()
    records = await filled(source)
    gone = await created(source, "gone")
    assert await source.commit("gone", gone.stamp, None, [receipt()]) == Committed()
    assert await source.delete("gone", gone.stamp) == Committed()
    receipts = {
        each.receipt for each in (await all_receipts(source)).values() if each.incarnation != gone.stamp.incarnation
    }
    await source.close()
    middle = SqliteTable(tmp_path / "middle.db", exclusive=True)
    if isinstance(table, SqliteTable):  # the tables' clocks stand still, and not where a server's is
        middle._clock = table._clock
    assert await migrate(source, middle.store(), silent) == Report(copied=3, receipts=9)
    assert await migrate(source, middle.store(), silent) == Report(present=3, receipts=9)

    await source.open()
    for name, record in records.items():
        assert await source.delete(name, record.stamp) == Committed()
    await source.close()
    assert await migrate(middle.store(), source, silent) == Report(copied=3, receipts=9)
    await source.open()
    try:
        for name, record in records.items():
            back = await loaded(source, name)
            assert back.data == record.data
            assert back.stamp.version > record.stamp.version, "never one that the deleted layer had"
            assert back.stamp.incarnation != record.stamp.incarnation
        moved = {(await loaded(source, name)).stamp.incarnation for name in NAMES}
        back_again = {each.receipt async for page in source.receipts() for each in page if each.incarnation in moved}
        assert back_again == receipts
    finally:
        await source.close()


async def test_history_and_pins_move_to_another_store_and_back(table: Table, tmp_path: Path) -> None:
    source = table.store()
    await source.open()
    newest, kept = await with_history(source)
    await source.close()
    middle = SqliteTable(tmp_path / "middle.db", exclusive=True)
    if isinstance(table, SqliteTable):
        middle._clock = table._clock
    moved = Report(copied=1, kept=3, pins=4, receipts=5)
    assert await migrate(source, middle.store(), silent) == moved
    assert await migrate(source, middle.store(), silent) == replace(moved, copied=0, present=1)
    store = middle.store()
    await store.open()
    await expect_history(store, newest, kept)
    (record,) = [await loaded(store, "kept")]
    assert record.stamp.version == newest.stamp.version
    assert record.stamp.incarnation != newest.stamp.incarnation
    assert await store.kept("kept") == tuple(
        Stamp(record.stamp.incarnation, version, commit_id)
        for version, commit_id in [
            (7, record.stamp.commit_id),
            *((k.stamp.version, k.stamp.commit_id) for k in kept[::-1]),
        ]
    )
    await store.close()

    await source.open()
    assert await source.delete("kept", newest.stamp, with_pins=True) == Committed()
    await source.close()
    assert await migrate(middle.store(), source, silent) == replace(moved, kept=4), (
        "the newest has a larger version now"
    )
    await source.open()
    try:
        assert (await loaded(source, "kept")).stamp.version == 8
        await expect_history(source, newest, kept)
    finally:
        await source.close()


async def test_an_overwritten_layer_keeps_nothing_of_its_own(tmp_path: Path) -> None:
    source, target = SqliteStore(tmp_path / "source.db"), SqliteStore(tmp_path / "target.db")
    await source.open()
    newest, kept = await with_history(source)
    await source.close()
    await target.open()
    mine = await created(target, "kept", b"mine")
    assert await target.pin("kept", mine.stamp, "mine", b"", 9) == Committed()
    await target.close()
    assert await migrate(source, target, silent) == Report(differing=["kept"])
    await target.open()
    assert await target.load_kept("kept", "mine") == mine
    await target.close()
    assert (await migrate(source, target, silent, overwrite=True)).complete
    await target.open()
    await expect_history(target, newest, kept)
    assert await target.load_kept("kept", "mine") == await target.load_kept("kept", 1) == NotKept()
    await target.close()


async def test_a_history_that_the_target_lost_is_told(tmp_path: Path) -> None:
    class Forgetful(SqliteStore):
        lost = 5

        async def load_kept(self, name, at, unless=None):  # type: ignore[no-untyped-def]
            return NotKept() if at == self.lost else await super().load_kept(name, at, unless)

    source = SqliteStore(tmp_path / "source.db")
    await source.open()
    await with_history(source)
    await source.close()
    report = await migrate(source, Forgetful(tmp_path / "target.db"), silent)
    assert (report.changed, report.kept, report.pins) == (["kept"], 2, 4)
    Forgetful.lost = 4
    report = await migrate(source, Forgetful(tmp_path / "target.db"), silent)
    assert (report.changed, report.kept) == (["kept"], 2)


async def test_what_an_online_source_gets_meanwhile_is_left_out_whole(tmp_path: Path) -> None:
    """A receipt without its batch would turn the caller's retry into a batch that is lost."""
    source = SqliteStore(tmp_path / "source.db", exclusive=False)
    await source.open()
    newest, kept = await with_history(source)
    late, used = after(newest, b"late"), receipt(version=8)

    class Meddling(SqliteStore):
        async def create(self, name: str, data: bytes, limit: int):  # type: ignore[no-untyped-def]
            assert await writer.commit("kept", newest.stamp, late, [used], 9) == Committed()
            assert await writer.pin("kept", late.stamp, "late", b"", 9) == Committed()
            return await super().create(name, data, limit)

    writer, target = source, Meddling(tmp_path / "target.db")
    report = await migrate(SqliteStore(tmp_path / "source.db", exclusive=False), target, silent, online=True)
    await writer.close()
    assert (report.changed, report.copied, report.pins) == (["kept"], 1, 4)
    await target.open()
    await expect_history(target, newest, kept)
    assert await target.load_kept("kept", "late") == NotKept()
    assert used.key not in await all_receipts(target)
    assert len(await all_receipts(target)) == 5
    await target.close()


@pytest.fixture
async def pair(tmp_path: Path) -> tuple[SqliteStore, SqliteStore]:
    """A filled source and an empty target."""
    source, target = SqliteStore(tmp_path / "source.db"), SqliteStore(tmp_path / "target.db")
    await source.open()
    await filled(source)
    await source.close()
    return source, target


async def test_versions_and_lifetimes_are_kept(pair: tuple[SqliteStore, SqliteStore]) -> None:
    await migrate(*pair, silent)
    await pair[0].open()
    await pair[1].open()
    for name in NAMES:
        old, new = await loaded(pair[0], name), await loaded(pair[1], name)
        assert (old.data, old.stamp.version) == (new.data, new.stamp.version)
        assert old.stamp.incarnation != new.stamp.incarnation
    old_receipts, new_receipts = await all_receipts(pair[0]), await all_receipts(pair[1])
    assert old_receipts.keys() == new_receipts.keys()
    for key, each in old_receipts.items():
        assert each.receipt == new_receipts[key].receipt
        assert 0 <= new_receipts[key].seconds - each.seconds < 3
    await pair[0].close()
    await pair[1].close()


async def test_a_stopped_migration_is_taken_up(pair: tuple[SqliteStore, SqliteStore]) -> None:
    source, target = pair

    def stop(what: str, done: int, total: int | None) -> None:
        if what == "receipts":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await migrate(source, target, stop)
    await target.open()  # and one that was stopped between a layer's two writes
    record = await loaded(target, "a")
    assert await target.delete("a", record.stamp) == Committed()
    await created(target, "a", record.data)
    await target.close()
    report = await migrate(source, target, silent)
    assert report.copied + report.present == 3
    assert report.complete
    assert report.receipts == 9


async def test_a_migration_that_was_stopped_between_the_two_writes_of_a_layer_is_finished(
    pair: tuple[SqliteStore, SqliteStore], tmp_path: Path
) -> None:
    """A layer is made first and gets its version then: one with a version that it never had must not stay."""

    class Stopping(SqliteStore):
        async def commit(self, *_: object) -> Committed:  # type: ignore[override]
            raise StoreError("stopped")

    source, target = pair
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="stopped"):
            await migrate(source, Stopping(tmp_path / "target.db"), silent, overwrite=overwrite)
        await target.open()
        halves = [await loaded(target, name) for name in NAMES]
        assert [half.stamp.version for half in halves] == [1, 1, 1], "or nothing was stopped in between"
        assert await all_receipts(target) == {}
        await target.close()
    assert await migrate(source, target, silent) == Report(copied=3, receipts=9)
    await source.open()
    await target.open()
    for half, name in zip(halves, NAMES, strict=True):
        old, new = await loaded(source, name), await loaded(target, name)
        assert (new.data, new.stamp.version) == (old.data, old.stamp.version)
        assert new.stamp.incarnation == half.stamp.incarnation
    assert len(await all_receipts(target)) == 9
    await source.close()
    await target.close()
    assert await migrate(source, target, silent) == Report(present=3, receipts=9)


async def test_progress_comes_to_its_end(pair: tuple[SqliteStore, SqliteStore]) -> None:
    """Seen: on a terminal the listing and the receipts went on to `9/?`, and the listing began anew at the end."""
    told: list[tuple[str, int, int | None]] = []
    await migrate(*pair, lambda *progress: told.append(progress))
    last = {what: (done, total) for what, done, total in told}
    assert last == {"listing": (3, 3), "layers": (3, 3), "receipts": (9, 9)}
    assert [what for what, _, _ in told] == sorted((what for what, _, _ in told), key=list(last).index)


async def test_what_the_target_has_otherwise_is_left_alone_unless_told(pair: tuple[SqliteStore, SqliteStore]) -> None:
    source, target = pair
    await target.open()
    own = await created(target, "a", b"another layer")
    high = Record(Stamp(own.stamp.incarnation, 50, 1), own.data)
    mine = receipt()
    assert await target.commit("a", own.stamp, high, [mine]) == Committed()
    await created(target, "only here", b"stays")
    await target.close()
    report = await migrate(source, target, silent)
    assert report == Report(copied=2, receipts=6, differing=["a"])
    assert not report.complete
    await target.open()
    assert await target.load("a") == high
    await target.close()

    assert await migrate(source, target, silent, overwrite=True) == Report(copied=1, present=2, receipts=9)
    assert await migrate(source, target, silent) == Report(present=3, receipts=9)
    await target.open()
    record = await loaded(target, "a")
    assert record.stamp.version > 50, "an ETag that a client holds never means another state"
    assert record.data == b"a 2" * 300
    assert await target.commit("a", record.stamp, None, [mine]) == Committed(), "the receipts of the old one are gone"
    assert (await loaded(target, "only here")).data == b"stays"
    await target.close()


async def test_a_source_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    source = SqliteStore(tmp_path / "source.db", exclusive=False)
    await source.open()
    records = await filled(source)
    writer = SqliteStore(tmp_path / "source.db", exclusive=False)
    await writer.open()
    await source.close()

    class Meddling(SqliteStore):
        async def close(self) -> None:
            await super().close()

        async def create(self, name: str, data: bytes, limit: int):  # type: ignore[no-untyped-def]
            if name == "a":
                record = records["a"]
                assert await writer.commit("a", record.stamp, after(record, b"meanwhile"), []) == Committed()
                await created(writer, "late")
            return await super().create(name, data, limit)

    report = await migrate(source, Meddling(tmp_path / "target.db"), silent)
    assert report.changed == ["a", "late"]
    assert not report.complete
    await writer.close()


async def test_a_store_is_not_moved_to_itself(pair: tuple[SqliteStore, SqliteStore], tmp_path: Path) -> None:
    with pytest.raises(SameStoreError, match=r"source\.db is both"):
        await migrate(pair[0], SqliteStore(tmp_path / "source.db"), silent)
    (tmp_path / "copy.db").write_bytes((tmp_path / "source.db").read_bytes())
    with pytest.raises(SameStoreError, match="one store, or a copy"):
        await migrate(pair[0], SqliteStore(tmp_path / "copy.db"), silent)


def test_stores_that_cannot_be_moved(tmp_path: Path) -> None:
    with pytest.raises(StoreRefusedError, match="lives in the process"):
        store_to_move("memory:", Settings(), target=True)
    with pytest.raises(StoreRefusedError, match="there is no file"):
        store_to_move(f"sqlite:///{tmp_path}/none.db", Settings(), target=False)
    assert not (tmp_path / "none.db").exists()


# -------------------------------------------------------------------------------------------------- the command

PASSWORD = "s3cr3t-of-the-test"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[valkey_servers.Server]:
    with valkey_servers.server(tmp_path_factory.mktemp("guarded"), requirepass=PASSWORD) as server:
        yield server


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATCHNORM_")}
    return subprocess.run(
        [sys.executable, "-m", "batchnorm_service", "migrate", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env=kept | {"PYTHONWARNINGS": "error"},
    )


async def test_the_command_moves_a_file_to_a_server(
    pair: tuple[SqliteStore, SqliteStore], guarded: valkey_servers.Server
) -> None:
    source = pair[0].url
    url = guarded.url.replace("//", f"//:{PASSWORD}@")
    done = command("--from", source, "--to", url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{source} -> {guarded.url}: 3 layers copied, 0 there and equal, 0 earlier states, 0 pins, 9 receipts;"
        " all read back\n"
    )
    assert done.stderr == "", "no bar where nobody looks"
    await pair[0].open()
    record = await loaded(pair[0], "a")
    assert await pair[0].commit("a", record.stamp, after(record, b"moved on"), []) == Committed()
    await pair[0].close()
    done = command("--from", source, "--to", url)
    assert done.returncode == 1
    assert re.search(r"--overwrite\): a$", done.stdout, re.MULTILINE)
    alias = url.replace("127.0.0.1", "localhost")
    refused = command("--from", url, "--to", alias)
    assert refused.returncode == 2
    assert "one store" in refused.stderr
    wrong = command("--from", source, "--to", url.replace(PASSWORD, f"{PASSWORD}-wrong"))
    assert wrong.returncode == 1
    assert "password" in wrong.stderr
    assert command("--from", source).returncode == 2
    for each in (done, refused, wrong):
        assert PASSWORD not in each.stdout + each.stderr
