"""What can go wrong with a Valkey server: each is told in words, and gone when its cause is."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from batchnorm_service.runtime import RUNTIME
from batchnorm_service.store.base import (
    Committed,
    Conflict,
    Duplicates,
    Missing,
    Pin,
    Record,
    StoreError,
    StoreRefusedError,
)
from batchnorm_service.store.valkey.connection import unfit
from batchnorm_service.store.valkey.keys import Keys
from batchnorm_service.store.valkey.store import ValkeyStore
from store.harness import LIMIT, RECEIPT_SECONDS, after, created, loaded, receipt
from store.valkey_servers import Server, flush, server

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
def own(tmp_path: Path) -> Iterator[Server]:
    """A server that a test may do anything to."""
    with server(tmp_path / "valkey", appendfsync="always") as own:
        yield own


@pytest.fixture
async def opened(anyio_backend: str, valkey_server: Server) -> AsyncIterator[ValkeyStore]:
    flush([valkey_server])
    store = ValkeyStore(valkey_server.url, RECEIPT_SECONDS, timeout=SLOW)
    await store.open()
    yield store
    await store.close()


async def error(call: object) -> str:
    with pytest.raises(StoreError) as failed:
        await call  # type: ignore[misc]
    return str(failed.value)


async def refusal(store: ValkeyStore) -> str:
    with pytest.raises(StoreRefusedError) as refused:
        await store.open()
    await store.close()
    return str(refused.value)


async def recovered(store: ValkeyStore) -> None:
    """Return when the store answers again."""
    deadline = time.monotonic() + SLOW
    while True:
        try:
            return await store.ping()
        except StoreError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


# ------------------------------------------------------------------------------------- servers that are in trouble


async def test_a_restart_of_the_server_loses_nothing_and_needs_none_of_the_service(own: Server) -> None:
    store = ValkeyStore(own.url, RECEIPT_SECONDS, timeout=SLOW)
    await store.open()
    try:
        first = await created(store, "a")
        gone = await created(store, "gone")
        second, key = after(first, b"second"), receipt()
        assert await store.commit("a", first.stamp, second, [key]) == Committed()
        assert await store.delete("gone", gone.stamp) == Committed()
        own.kill()
        assert "refused" in await error(store.load("a"))
        assert "refused" in await error(store.commit("a", second.stamp, None, [receipt()]))
        own.start()
        assert await store.commit("a", second.stamp, after(second, b"x"), [key]) == Duplicates((key,))
        assert await store.load("a") == second
        assert await store.load("gone") == Missing()
        assert (await created(store, "gone")).stamp.version > gone.stamp.version
    finally:
        await store.close()


async def test_a_restart_while_nobody_calls_is_not_noticed(own: Server) -> None:
    store = ValkeyStore(own.url, timeout=SLOW)
    await store.open()
    try:
        record = await created(store, "a")
        own.kill()
        own.start()
        for _ in range(5):
            await asyncio.sleep(0)  # time for the loop to hear of it
        assert await store.commit("a", record.stamp, None, [receipt()]) == Committed()
    finally:
        await store.close()


async def test_a_server_that_hangs_is_an_error_and_then_none(own: Server) -> None:
    store = ValkeyStore(own.url, timeout=0.3)
    await store.open()
    try:
        record = await created(store, "a")
        own.signal(signal.SIGSTOP)
        new, key = after(record, b"new"), receipt()
        began = time.monotonic()
        calls = [store.commit("a", record.stamp, new, [key]), *(store.load("a") for _ in range(500))]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, StoreError) for answer in answers)
        assert "no answer in time" in str(answers[0])
        assert time.monotonic() - began < SLOW
        own.signal(signal.SIGCONT)
        await recovered(store)
        assert await store.commit("a", record.stamp, new, [key]) in (Committed(), Duplicates((key,)))
        assert await store.load("a") == new
    finally:
        own.signal(signal.SIGCONT)
        await store.close()


async def test_a_server_that_cuts_connections_is_an_error_and_then_none(own: Server) -> None:
    store = ValkeyStore(own.url, timeout=SLOW)
    await store.open()
    try:
        record = await created(store, "a", b"0")
        for n in range(20):
            new, key = after(record, b"%d" % n), receipt()
            answer = asyncio.ensure_future(store.commit("a", record.stamp, new, [key]))
            await asyncio.sleep(0)
            own.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.wait([answer])
            assert await insisted(store, record, new, [key], answer)
            record = new
        assert await loaded(store, "a") == record
    finally:
        await store.close()


async def insisted(
    store: ValkeyStore, record: Record, new: Record, keys: list[object], answer: asyncio.Future[object]
) -> bool:
    """Whether a commit took effect once, whatever its first try said."""
    outcome = answer.exception() or answer.result()
    while isinstance(outcome, StoreError):
        try:
            outcome = await store.commit("a", record.stamp, new, keys)  # type: ignore[arg-type]
        except StoreError as again:
            outcome = again
    return outcome in (Committed(), Duplicates(tuple(keys)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("on", "off", "words"),
    [
        (["CONFIG", "SET", "min-replicas-to-write", 1], ["CONFIG", "SET", "min-replicas-to-write", 0], "NOREPLICAS"),
        (["REPLICAOF", "127.0.0.1", 1], ["REPLICAOF", "NO", "ONE"], "READONLY"),
    ],
)
async def test_a_server_that_may_not_write_answers_no_reads_either(
    own: Server, on: list[str | int], off: list[str | int], words: str
) -> None:
    """A primary that was demoted, or cut off from its replicas, would answer with what others have replaced."""
    store = ValkeyStore(own.url, timeout=SLOW)
    await store.open()
    try:
        record = await created(store, "a")
        own.command(*on)
        assert words in await error(store.commit("a", record.stamp, after(record, b"x"), [receipt()]))
        assert words in await error(store.load("a")) or "is a replica" in await error(store.load("a"))
        own.command(*off)
        assert await store.load("a") == record
        assert await store.commit("a", record.stamp, after(record, b"x"), [receipt()]) == Committed()
    finally:
        await store.close()


async def test_a_server_without_memory_refuses_whole_commits_and_still_deletes(own: Server) -> None:
    store = ValkeyStore(own.url, timeout=SLOW)
    await store.open()
    try:
        a, b = await created(store, "a"), await created(store, "b")
        own.command("CONFIG", "SET", "maxmemory", 1)
        keys = [receipt() for _ in range(10)]
        assert "memory" in await error(store.commit("a", a.stamp, after(a, b"x"), keys))
        assert "memory" in await error(store.create("c", b"", LIMIT))
        assert await store.load("a") == a
        assert await store.delete("b", b.stamp) == Committed()
        own.command("CONFIG", "SET", "maxmemory", 0)
        assert await store.commit("a", a.stamp, after(a, b"x"), keys) == Committed(), "not one receipt was left behind"
    finally:
        await store.close()


async def test_a_server_that_came_back_evicting_keys_is_not_used(own: Server) -> None:
    store = ValkeyStore(own.url, timeout=SLOW)
    await store.open()
    try:
        await created(store, "a")
        own.kill()
        own.start(maxmemory_policy="volatile-ttl")
        assert "set maxmemory-policy to noeviction" in await error(store.load("a"))
        own.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        await loaded(store, "a")
    finally:
        await store.close()


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_server_that_evicts_keys_is_refused(own: Server, policy: str) -> None:
    own.command("CONFIG", "SET", "maxmemory-policy", policy)
    words = await refusal(ValkeyStore(own.url))
    assert f"maxmemory-policy {policy}" in words
    assert "set maxmemory-policy to noeviction" in words


async def test_a_newer_layout_is_refused_and_another_prefix_is_another_table(own: Server) -> None:
    own.admin.set(Keys("bn").schema(), "7")
    words = await refusal(ValkeyStore(own.url))
    assert "schema version 7" in words
    assert "this release knows 1" in words
    store = ValkeyStore(f"{own.url}?prefix=other")
    await store.open()
    await created(store, "a")
    await store.close()
    assert all(key.startswith((b"other:", b"bn:")) for key in own.command("KEYS", "*"))


async def test_nobody_there_is_refused_in_words(own: Server) -> None:
    own.kill()
    words = await refusal(ValkeyStore(own.url))
    assert f"127.0.0.1:{own.port}" in words
    assert "refused" in words
    own.start()


async def test_a_wrong_password_is_refused_in_words_and_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with server(tmp_path / "valkey", requirepass="r%ght/one") as guarded:
        guarded.command("ACL", "SETUSER", "me", "on", ">my@word", "~bn:*", *RIGHTS)

        def at(credentials: str) -> ValkeyStore:
            return ValkeyStore(guarded.url.replace("//", f"//{credentials}", 1))

        for credentials in (":wr0ng@", "me:wr0ng@", "nobody:wr0ng@"):
            words = await refusal(at(credentials))
            assert "refuses the user or the password" in words
            assert "wr0ng" not in words
        assert "a password is needed" in await refusal(at(""))
        for credentials in (":r%25ght%2Fone@", "default:r%25ght%2Fone@", "me:my%40word@"):
            store = at(credentials)
            await store.open()
            record = await created(store, name := f"of {credentials}")
            assert await store.commit(name, record.stamp, after(record, b"won"), [receipt()]) == Committed()
            assert isinstance(await store.commit(name, record.stamp, after(record, b"lost"), [receipt()]), Conflict)
            won = await loaded(store, name)
            assert (await store.commit(name, won.stamp, after(won, b"again"), [receipt()])).contenders == 1
            await store.delete(name, won.stamp.next(RUNTIME.bits(63)))
            made = await created(store, name := f"history of {credentials}")
            assert await store.pin(name, made.stamp, "tag", b"", 1) == Committed()
            assert await store.commit(name, made.stamp, newest := after(made, b"next"), [], 1) == Committed()
            assert await store.load_kept(name, "tag") == made
            assert await store.kept(name) == (made.stamp,)
            assert await store.unpin(name, made.stamp.incarnation, "tag", 0) == Committed()
            assert await store.import_history(name, made.stamp.incarnation, [made], [Pin("tag", 1, b"")]) == Committed()
            assert await store.pins(name) == (Pin("tag", 1, b""),)
            assert await store.delete(name, newest.stamp, with_pins=True) == Committed()
            assert store.url == guarded.url
            await store.close()
        guarded.command("ACL", "SETUSER", "me", "-time")
        store = at("me:my%40word@")
        assert re.search("permission|can't run", await refusal(store))
        guarded.command("ACL", "SETUSER", "me", "+time", "-set")
        store = at("me:my%40word@")
        assert re.search("permission|can't run", await refusal(store))
    assert "wr0ng" not in caplog.text
    assert "ght" not in caplog.text


async def test_a_store_that_is_open_cannot_be_opened_again(opened: ValkeyStore) -> None:
    assert "open already" in await error(opened.open())
    await opened.ping()


async def test_opening_can_be_cancelled(valkey_server: Server) -> None:
    store = ValkeyStore(valkey_server.url, timeout=SLOW)
    for steps in range(8):
        task = asyncio.ensure_future(store.open())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()
    await store.open()
    await store.close()


@pytest.mark.parametrize(
    ("info", "cluster", "words"),
    [
        ({"redis_version": "6.2.14"}, False, "is Redis 6.2.14; Redis 7.0"),
        ({}, False, "Redis 7.0 or any Valkey is needed"),
        ({"redis_version": "7.2.4", "loading": "1"}, False, "still loading"),
        ({"redis_version": "7.2.4", "role": "slave"}, False, "is a replica"),
        ({"redis_version": "7.2.4", "role": "master", "cluster_enabled": "1"}, False, "valkey+cluster://"),
        ({"redis_version": "7.2.4", "role": "master"}, True, "valkey://host:port/0"),
    ],
)
def test_what_a_server_says_of_itself_may_make_it_unfit(info: dict[str, str], cluster: bool, words: str) -> None:
    assert words in (unfit(info, cluster=cluster) or "")
