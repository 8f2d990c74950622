"""Replicas of this release beside replicas of an older one, on one server: new keys are additions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from batchnorm_service.store.base import Committed, GroupStatus, Missing, NotKept, Pinned, Record, Shard, Stamp
from batchnorm_service.store.valkey.keys import Keys, bucket_of, pack_number, pack_stamp
from batchnorm_service.store.valkey.store import ValkeyStore
from store.harness import RECEIPT_SECONDS, after, created
from store.valkey_servers import Server, flush

pytestmark = pytest.mark.anyio

GROUP = b"g" * 16
MILLISECONDS = int(1000 * RECEIPT_SECONDS)

# The scripts of 0.1.0 before `j:` was added, with their numbers filled in.
OLD_JOIN: Final = """#!lua
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return {0} end
local size = redis.call('HGET', KEYS[2], 'size') or ARGV[3]
local count = math.max(redis.call('HLEN', KEYS[2]) - 1, 0)
local added = 0
if size == ARGV[3] and count < tonumber(size) and redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then
    redis.call('HSET', KEYS[2], ARGV[2], ARGV[4], 'size', size)
    redis.call('HSET', KEYS[3], ARGV[2], ARGV[5])
    if count == 0 then
        redis.call('PEXPIRE', KEYS[2], ARGV[6])
        redis.call('PEXPIRE', KEYS[3], ARGV[6])
    end
    added, count = 1, count + 1
end
local parts = {}
if count == tonumber(size) then parts = redis.call('HGETALL', KEYS[3]) end
return {3, added, redis.call('HGETALL', KEYS[2]), parts}
"""
OLD_LEAVE: Final = """#!lua flags=allow-oom
if ARGV[1] ~= '' then
    redis.call('HDEL', KEYS[1], ARGV[1])
    redis.call('HDEL', KEYS[2], ARGV[1])
end
if ARGV[1] == '' or redis.call('HLEN', KEYS[1]) < 2 then redis.call('UNLINK', KEYS[1], KEYS[2]) end
return 3
"""


def shard(member: int) -> Shard:
    return Shard(bytes([member]) * 16, bytes([member + 100]) * 16, b"part %d" % member)


class OldReplica:
    """What a replica of the older release sends for a group of layer `a`, and how it reads the answers."""

    def __init__(self, server: Server, incarnation: int) -> None:
        self._server = server
        self._incarnation = incarnation
        self._keys = Keys("bn").record("a"), *Keys("bn").group("a", incarnation, GROUP)[:2]

    def join(self, size: int, own: Shard) -> GroupStatus:
        args: tuple[Any, ...] = (pack_number(self._incarnation), own.member, size, own.fingerprint, own.part)
        reply = self._server.command("EVAL", OLD_JOIN, 3, *self._keys, *args, MILLISECONDS)
        _, added, fields, parts = reply
        members = dict(sorted(zip(fields[::2], fields[1::2], strict=True)))
        opened = int(members.pop(b"size"))
        by_member = sorted(zip(parts[::2], parts[1::2], strict=True))
        return GroupStatus(opened, members, tuple(part for _, part in by_member), bool(added))

    def leave(self, member: bytes | None) -> None:
        self._server.command("EVAL", OLD_LEAVE, 2, *self._keys[1:], member or b"")


@pytest.fixture
async def new(anyio_backend: str, valkey_server: Server) -> AsyncIterator[ValkeyStore]:
    flush([valkey_server])
    store = ValkeyStore(valkey_server.url, RECEIPT_SECONDS, timeout=30)
    await store.open()
    yield store
    await store.close()


OLD_DELETE: Final = """#!lua flags=allow-oom
redis.call('SET', KEYS[3], string.sub(redis.call('GET', KEYS[1]), 9, 16))
redis.call('UNLINK', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return {3}
"""
OLD_CREATE: Final = """#!lua
redis.call('SET', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], 0, ARGV[2])
return {3}
"""


@pytest.mark.parametrize("creator", ["an older release", "this one"])
async def test_a_layer_that_an_older_release_deleted_leaves_no_history_to_the_next(
    new: ValkeyStore, valkey_server: Server, creator: str
) -> None:
    first = await created(new, "a")
    assert await new.pin("a", first.stamp, "tag", b"", 1) == Committed()
    assert await new.commit("a", first.stamp, after(first, b"second"), [], 3) == Committed()
    keys, bucket = Keys("bn"), bucket_of("a")
    names = [keys.record("a"), keys.names(bucket), keys.floor(bucket)]
    valkey_server.command("EVAL", OLD_DELETE, 3, *names, "a")
    assert await new.kept("a") == await new.pins("a") == Missing()
    if creator == "this one":
        record = await created(new, "a")
        assert not valkey_server.admin.exists(*keys.history("a"))
    else:
        record = Record(Stamp(first.stamp.incarnation ^ 1, 3, 1), b"new")
        valkey_server.command("EVAL", OLD_CREATE, 2, *names[:2], pack_stamp(record.stamp) + record.data, "a")
    assert await new.load("a") == record
    assert await new.kept("a") == await new.pins("a") == ()
    assert await new.load_kept("a", "tag") == await new.load_kept("a", 1) == NotKept()
    assert await new.pin("a", record.stamp, "other", b"", 1) == Committed(), "old pins are not counted"
    newest = after(record, b"newest")
    assert await new.commit("a", record.stamp, newest, [], 1) == Committed()
    assert await new.kept("a") == (record.stamp,)
    assert await new.delete("a", newest.stamp) == Pinned()
    assert await new.delete("a", newest.stamp, with_pins=True) == Committed()
    assert not valkey_server.admin.exists(*keys.history("a"))


@pytest.mark.parametrize("order", ["old first", "new first"])
async def test_a_group_meets_through_replicas_of_both_releases(
    new: ValkeyStore, valkey_server: Server, order: str
) -> None:
    made = (await created(new, "a")).stamp.incarnation
    old = OldReplica(valkey_server, made)
    complete = GroupStatus(2, {shard(n).member: shard(n).fingerprint for n in (1, 2)}, (shard(1).part, shard(2).part))
    if order == "old first":
        first: Any = old.join(2, shard(1))
        second: Any = await new.join("a", made, GROUP, 2, shard(2))
    else:
        first = await new.join("a", made, GROUP, 2, shard(1))
        second = old.join(2, shard(2))
    assert first == GroupStatus(2, {shard(1).member: shard(1).fingerprint}, ())
    assert second == complete
    assert (first.added, second.added) == (True, True)
    for again in (old.join(2, shard(1)), await new.join("a", made, GROUP, 2, shard(1))):
        assert again == complete
        assert not again.added


@pytest.mark.parametrize("member", [shard(1).member, None], ids=["one", "all"])
async def test_what_an_older_replica_leaves_behind_expires_and_is_in_nobodys_way(
    new: ValkeyStore, valkey_server: Server, member: bytes | None
) -> None:
    made = (await created(new, "a")).stamp.incarnation
    old = OldReplica(valkey_server, made)
    await new.join("a", made, GROUP, 2, shard(1))
    old.leave(member)
    left = [key for key in valkey_server.command("KEYS", "*") if key in Keys("bn").group("a", made, GROUP)]
    assert all(0 < valkey_server.admin.pttl(key) <= MILLISECONDS for key in left)
    assert old.join(2, shard(1)).added
    again = await new.join("a", made, GROUP, 2, shard(1))
    assert isinstance(again, GroupStatus)
    assert not again.added, "another replica's call brought it"
    await new.leave("a", made, GROUP, None)
    assert not [key for key in valkey_server.command("KEYS", "*") if key in Keys("bn").group("a", made, GROUP)]
