"""What only the SQLite store does: group commit, failures of the disk, crashes, other processes."""

from __future__ import annotations

import asyncio
import gc
import re
import secrets
import sqlite3
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from batchnorm_service.layers.idempotency import make_token
from batchnorm_service.runtime import RUNTIME
from batchnorm_service.store.base import Committed, Conflict, Duplicates, Missing, Record, Shard, StoreError
from batchnorm_service.store.sqlite.store import SqliteStore
from store.harness import LIMIT, RECEIPT_SECONDS, Clock, Clocks, Sabotaged, after, child, created, loaded, receipt

pytestmark = pytest.mark.anyio


class Pause(Clock):
    """A clock at which the store's thread can be held: whatever is called meanwhile has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.held = threading.Event()
        self._go = threading.Event()
        self._go.set()

    def __call__(self) -> float:
        self.held.set()
        assert self._go.wait(60)
        return self.now

    async def hold(self, store: SqliteStore, record: Record) -> asyncio.Task[object]:
        """Hold the thread in the middle of a commit that conflicts."""
        self.held.clear()
        self._go.clear()
        stale = record.stamp._replace(commit_id=0)
        call: asyncio.Task[object] = asyncio.ensure_future(store.commit("held", stale, None, []))
        await asyncio.to_thread(self.held.wait)
        return call

    def release(self) -> None:
        self._go.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "layers.db"


@pytest.fixture
def clock() -> Pause:
    return Pause()


@pytest.fixture
async def sqlite(anyio_backend: str, sabotage: type[Sabotaged], path: Path, clock: Pause) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, RECEIPT_SECONDS, runtime=Clocks(wall=clock))
    await store.open()
    yield store
    sabotage.before = None
    clock.release()
    await store.close()


async def test_commits_that_wait_together_share_one_transaction(sqlite: SqliteStore, clock: Pause) -> None:
    held = await created(sqlite, "held")
    records = [await created(sqlite, f"n{n}") for n in range(64)]
    call = await clock.hold(sqlite, held)
    before = sqlite.transactions
    calls = [
        asyncio.ensure_future(sqlite.commit(f"n{n}", record.stamp, after(record, b"new"), [receipt()]))
        for n, record in enumerate(records)
    ]
    await asyncio.sleep(0)  # each has made its call
    clock.release()
    assert await call == Conflict()
    assert await asyncio.gather(*calls) == [Committed()] * 64
    assert sqlite.transactions - before == 2, "the one that was held, and one for all 64"


async def test_calls_on_one_name_in_one_transaction_see_each_other(sqlite: SqliteStore, clock: Pause) -> None:
    held = await created(sqlite, "held")
    call = await clock.hold(sqlite, held)
    before = sqlite.transactions
    second, rival, key = after(held, b"second"), after(held, b"rival"), receipt()
    calls = asyncio.gather(
        sqlite.load("held"),
        sqlite.commit("held", held.stamp, second, [key]),
        sqlite.commit("held", held.stamp, rival, [receipt()]),
        sqlite.commit("held", second.stamp, None, [key]),
        sqlite.load("held"),
        sqlite.list("", "", 10),
        sqlite.delete("held", second.stamp),
        sqlite.create("held", b"anew", LIMIT),
    )
    await asyncio.sleep(0)
    clock.release()
    *answers, anew = await calls
    assert isinstance(anew, Record)
    assert anew.stamp.version > second.stamp.version
    entry = ("held", anew.stamp, b"anew")
    assert answers == [held, Committed(), Conflict(), Duplicates((key,)), anew, [entry], Committed()]
    await call
    assert sqlite.transactions - before == 2


async def test_a_call_that_was_cancelled_before_it_began_is_not_done(sqlite: SqliteStore, clock: Pause) -> None:
    held = await created(sqlite, "held")
    call = await clock.hold(sqlite, held)
    cancelled = asyncio.ensure_future(sqlite.create("cancelled", b"", LIMIT))
    kept = asyncio.ensure_future(sqlite.create("kept", b"", LIMIT))
    await asyncio.sleep(0)
    cancelled.cancel()
    call.cancel()  # this one has begun: the thread must bear that nobody waits for its answer
    await asyncio.gather(cancelled, call, return_exceptions=True)
    clock.release()
    assert isinstance(await kept, Record)
    assert await sqlite.load("cancelled") == Missing()


@pytest.mark.parametrize("at", ["COMMIT", "BEGIN IMMEDIATE", "INSERT INTO layers"])
async def test_when_a_transaction_fails_every_waiter_hears_it_and_the_next_one_works(
    sqlite: SqliteStore, clock: Pause, sabotage: type[Sabotaged], at: str
) -> None:
    held = await created(sqlite, "held")
    records = [await created(sqlite, f"n{n}") for n in range(5)]
    news, keys = [after(record, b"new") for record in records], [receipt() for _ in records]

    def calls() -> list[asyncio.Task[object]]:
        commits = [sqlite.commit(f"n{n}", records[n].stamp, news[n], [keys[n]]) for n in range(5)]
        return [asyncio.ensure_future(call) for call in (*commits, sqlite.create("new", b"", LIMIT))]

    def fail(_: sqlite3.Connection, sql: str) -> None:
        if sql.startswith(at):
            raise sqlite3.OperationalError("disk I/O error")

    call = await clock.hold(sqlite, held)
    first = calls()
    await asyncio.sleep(0)
    call.cancel()
    sabotage.before = fail
    clock.release()
    answers = await asyncio.gather(*first, return_exceptions=True)
    assert [type(answer) for answer in answers] == [StoreError] * 6
    assert len({id(answer) for answer in answers}) == 6
    assert "disk I/O error" in str(answers[0])

    if at != "COMMIT":  # which ends a read too; otherwise reads go on meanwhile, and see nothing of it
        assert await asyncio.gather(*(sqlite.load(f"n{n}") for n in range(5))) == records
    sabotage.before = None
    assert await sqlite.load("new") == Missing()
    *committed, new = await asyncio.gather(*calls())
    assert committed == [Committed()] * 5, "neither records nor receipts had been written"
    assert isinstance(new, Record)
    assert await asyncio.gather(*(sqlite.load(f"n{n}") for n in range(5))) == news


async def test_what_was_not_rolled_back_is_never_seen(sqlite: SqliteStore, sabotage: type[Sabotaged]) -> None:
    record = await created(sqlite, "a")

    def fail(_: sqlite3.Connection, sql: str) -> None:
        if sql in ("COMMIT", "ROLLBACK"):
            raise sqlite3.OperationalError("disk I/O error")

    sabotage.before = fail
    with pytest.raises(StoreError):
        await sqlite.commit("a", record.stamp, after(record, b"never"), [])
    with pytest.raises(StoreError):
        await sqlite.load("a")
    sabotage.before = None
    assert await sqlite.load("a") == record
    assert await sqlite.commit("a", record.stamp, after(record, b"then"), []) == Committed()


async def test_a_full_database_refuses_and_recovers(sqlite: SqliteStore, sabotage: type[Sabotaged]) -> None:
    record, small = await created(sqlite, "a"), await created(sqlite, "small")
    new, key = after(record, bytes(10**6)), receipt()

    def limit(pages: int) -> Callable[[sqlite3.Connection, str], None]:
        def before(connection: sqlite3.Connection, sql: str) -> None:
            if sql.startswith("BEGIN"):
                sqlite3.Connection.execute(connection, f"PRAGMA max_page_count = {pages}").fetchall()

        return before

    sabotage.before = limit(30)
    with pytest.raises(StoreError, match="full"):
        await sqlite.commit("a", record.stamp, new, [key])
    assert await sqlite.load("a") == record
    assert await sqlite.commit("small", small.stamp, after(small, b"fits"), []) == Committed()
    sabotage.before = limit(10**6)
    assert await sqlite.commit("a", record.stamp, new, [key]) == Committed()
    assert await sqlite.load("a") == new


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_write_that_the_system_refuses_is_an_error_and_is_tried_afresh(path: Path) -> None:
    with child("full_disk", path) as process:
        output, _ = process.communicate(timeout=60)
    assert output.splitlines() == ["[True, True, True]", "[True, True, True]", str([Committed()] * 3)]


async def test_a_call_that_can_never_work_fails_alone(sqlite: SqliteStore, clock: Pause) -> None:
    """Otherwise one caller that repeats it would take down whoever happens to wait beside it."""
    held = await created(sqlite, "held")
    other = await created(sqlite, "other")
    call = await clock.hold(sqlite, held)
    calls = asyncio.gather(
        sqlite.create("not \ud800 UTF-8", b"", LIMIT),
        sqlite.commit("other", other.stamp, after(other, b"new"), [receipt()]),
        sqlite.commit("held", held.stamp, after(held, b"lost"), [receipt(batch=2**63)]),
        sqlite.create("new", b"", LIMIT),
        return_exceptions=True,
    )
    await asyncio.sleep(0)
    clock.release()
    await call
    answers = await calls
    assert isinstance(answers[0], StoreError)
    assert answers[1] == Committed()
    assert isinstance(answers[2], StoreError)
    assert isinstance(answers[3], Record)
    assert await sqlite.load("held") == held, "its record was not written without its receipt"


async def test_expired_receipts_are_purged_in_small_steps(sqlite: SqliteStore, clock: Pause) -> None:
    record = await created(sqlite, "a")
    gone = await created(sqlite, "gone")
    assert await sqlite.commit("gone", gone.stamp, None, [receipt() for _ in range(500)]) == Committed()
    assert await sqlite.delete("gone", gone.stamp) == Committed()
    left = [500]
    clock.now += RECEIPT_SECONDS + 2
    for _ in range(6):
        assert await sqlite.commit("a", record.stamp, None, [receipt()]) == Committed()
        left.append(await _receipts(sqlite))
    assert left == [500, 400, 300, 200, 100, 5, 6], "100 go besides one for each that comes"


async def test_receipts_are_purged_faster_than_they_come(sqlite: SqliteStore, clock: Pause) -> None:
    record = await created(sqlite, "a")
    assert await sqlite.commit("a", record.stamp, None, [receipt() for _ in range(2000)]) == Committed()
    clock.now += RECEIPT_SECONDS + 2
    for _ in range(5):
        assert await sqlite.commit("a", record.stamp, None, [receipt() for _ in range(400)]) == Committed()
    assert await _receipts(sqlite) == 2000


async def test_receipts_in_ascending_order_touch_few_pages(sqlite: SqliteStore) -> None:
    """What a transaction flushes: 32 receipts are two pages of a table, and the keys that the service makes ascend."""

    async def pages(keys: Callable[[], bytes]) -> int:
        await sqlite._do("", lambda c: c.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        receipts = [receipt()._replace(key=keys()) for _ in range(32)]
        assert await sqlite.commit("a", record.stamp, None, receipts) == Committed()
        return await asyncio.to_thread(_pages_of_the_log, sqlite)

    record = await created(sqlite, "a")
    for _ in range(40):  # so many that the next ones are far apart in an index by key
        assert await sqlite.commit("a", record.stamp, None, [receipt() for _ in range(250)]) == Committed()
    assert await pages(lambda: secrets.token_bytes(16)) > 30
    for _ in range(3):
        assert await pages(lambda: make_token(RUNTIME, None, "train").key) < 20


def _pages_of_the_log(store: SqliteStore) -> int:
    return Path(f"{store.path}-wal").stat().st_size // 4096


async def _receipts(store: SqliteStore) -> int:
    """Count through the store's own thread: an exclusive file has no second reader."""
    return int(await store._do("", lambda c: c.execute("SELECT count(*) FROM receipts").fetchone()[0]))


async def test_the_file_is_flushed_at_every_commit(sqlite: SqliteStore) -> None:
    async def pragma(name: str) -> object:
        return (await sqlite._do("", lambda c: c.execute(f"PRAGMA {name}").fetchone()))[0]

    assert await pragma("journal_mode") == "wal"
    assert await pragma("synchronous") == 2
    assert await pragma("locking_mode") == "exclusive"


async def test_only_commits_that_keep_pay_for_the_history(sqlite: SqliteStore, sabotage: type[Sabotaged]) -> None:
    """And the record that is kept never leaves the database."""
    record = await created(sqlite, "a", secrets.token_bytes(500_000))
    statements: list[str] = []
    sabotage.before = lambda _, sql: statements.append(sql)
    new = after(record, b"new")
    assert await sqlite.commit("a", record.stamp, new, [receipt()]) == Committed()
    assert not [sql for sql in statements if "kept" in sql or "pins" in sql]
    plain, newer = len(statements), after(new, b"newer")
    statements.clear()
    assert await sqlite.commit("a", new.stamp, newer, [receipt()], 1) == Committed()
    assert len(statements) == plain + 2
    assert [sql.split()[0] for sql in statements if "kept" in sql] == ["INSERT", "DELETE"]
    assert not [sql for sql in statements if sql.startswith("SELECT") and "data" in sql]


async def test_searches_in_the_history_read_no_record(sqlite: SqliteStore, path: Path) -> None:
    searches = (
        "SELECT incarnation, version, commit_id FROM kept WHERE incarnation = 1 ORDER BY version DESC",
        "SELECT version FROM kept WHERE incarnation = 1 AND version NOT IN (SELECT version FROM pins WHERE"
        " incarnation = 1) ORDER BY version DESC LIMIT -1 OFFSET 2",
        "SELECT tag, version, data FROM pins WHERE incarnation = 1 ORDER BY tag",
    )
    await sqlite.close()
    with closing(sqlite3.connect(path)) as connection:
        for search in searches:
            plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {search}"))
            assert "SCAN" not in plan, search
            assert "TEMP B-TREE" not in plan, search
            assert "INDEX" in plan, search


async def test_reading_a_stamp_or_a_list_scans_no_table(sqlite: SqliteStore) -> None:
    def plan(statement: str, connection: sqlite3.Connection) -> str:
        return " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}"))

    statements: list[str] = []
    await sqlite._do("", lambda c: c.set_trace_callback(statements.append))
    record = await created(sqlite, "a")
    await sqlite.load("a", record.stamp)
    await sqlite.commit("a", record.stamp, after(record, b""), [receipt() for _ in range(5)])
    await sqlite.list("a", "", 5)
    record = await loaded(sqlite, "a")
    await sqlite.delete("a", record.stamp)
    await sqlite._do("", lambda c: c.set_trace_callback(None))
    queries = {each for each in statements if re.match("SELECT|INSERT|UPDATE|DELETE", each) and " meta" not in each}
    assert len(queries) >= 7
    for query in queries:
        found = await sqlite._do("", partial(plan, query))
        assert not re.search(r"SCAN (?!\d+ CONSTANT ROW|CONSTANT ROW|wanted)", found), query
        assert "(key=?)" not in found, "an index that is used by half goes through all receipts of a layer"
        assert "TEMP B-TREE" not in found, query


def test_what_was_acknowledged_survives_kill_9(path: Path) -> None:
    with child("commit_until_killed", path) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(100)]
        process.kill()
        lines += process.stdout.readlines()
    acknowledged = [line.split() for line in lines if line.endswith("\n")]
    version = int(acknowledged[-1][0])
    key = bytes.fromhex(acknowledged[-1][1])

    async def check() -> None:
        store = SqliteStore(path, RECEIPT_SECONDS)
        await store.open()
        try:
            record = await loaded(store, "a")
            assert record.stamp.version >= version
            assert record.data == str(record.stamp.version).encode() * 2000
            answer = await store.commit("a", record.stamp, None, [receipt()._replace(key=key)])
            assert isinstance(answer, Duplicates)
            assert answer.receipts[0].version == version
        finally:
            await store.close()

    asyncio.run(check())


async def test_looks_at_a_group_wait_for_no_writer(path: Path, anyio_backend: str) -> None:
    """Each look took the lock for writers, twice."""
    store = SqliteStore(path, RECEIPT_SECONDS, exclusive=False, busy_seconds=0)
    await store.open()
    try:
        record, used = await created(store, "a"), receipt()
        made = record.stamp.incarnation
        assert await store.commit("a", record.stamp, None, [used]) == Committed()
        member = Shard(b"1" * 16, bytes(16), b"part")
        came = await store.join("a", made, b"g" * 16, 2, member)
        before = store.transactions
        with closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="locked"):
                await store.commit("a", record.stamp, None, [receipt()])
            assert await store.find_receipts("a", made, [used.key, receipt().key]) == (used,)
            assert await store.join("a", made, b"g" * 16, 2, member) == came
        assert store.transactions == before
    finally:
        await store.close()


async def test_increments_by_several_processes_count_once_each(path: Path, anyio_backend: str) -> None:
    store = SqliteStore(path, RECEIPT_SECONDS, exclusive=False)
    await store.open()
    try:
        first = await created(store, "a", b"0")
        processes = [child("increment", path, 30) for _ in range(3)]
        for process in processes:
            await asyncio.to_thread(process.communicate)
        assert [process.returncode for process in processes] == [0, 0, 0]
        last = await loaded(store, "a")
        assert last.data == b"90"
        assert last.stamp.version - first.stamp.version == 90
    finally:
        await store.close()


async def test_listings_leave_nothing_in_memory(path: Path) -> None:
    """Python's sqlite3 keeps a weak reference to each blob that was ever opened, until the connection is closed."""
    store = SqliteStore(path)
    await store.open()
    for number in range(10):
        await created(store, f"n{number}")
    gc.collect()
    before = sum(isinstance(each, weakref.ref) for each in gc.get_objects())
    for _ in range(100):
        assert len(await store.list("", "", 10)) == 10
    gc.collect()
    assert sum(isinstance(each, weakref.ref) for each in gc.get_objects()) < before + 300
    await store.close()
