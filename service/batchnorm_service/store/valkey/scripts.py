"""Lua scripts that run in the server. Each reads and writes one bucket, atomically.

All start with `#!lua`, so that a server that cannot write (out of memory, disk error, too few replicas, being a
replica) refuses a script as a whole instead of stopping it halfway. Read-only scripts deliberately lack the flag
`no-writes`: a server that cannot write, such as a demoted primary, must not serve stale reads. A stamp's numbers are
compared as bytes, because Lua's numbers have 53 bits.

WAIT covers the writes of its own connection only. A repeated call may find its effects in place, written by an earlier
attempt on another connection and not replicated yet. So if a WAIT follows, such a script writes anyway: a commit renews
its receipts, other scripts rewrite what they found. (Writing an unchanged value is replicated too.)

A commit with a conflict is recorded next to the record until it succeeds, and a successful commit returns the number of
such contenders. They are neither replicated nor written to the append-only file: they are only a hint, and a commit
that writes nothing must not wait for replicas or a disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import sha1
from string import Template
from typing import Final

from batchnorm_service.store.base import CONTENDER_SECONDS, HEAD_BYTES
from batchnorm_service.store.valkey.keys import STAMP_BYTES


class ReplyCode(IntEnum):
    """First element of a script's reply. `OTHER`: the record's incarnation differs from that of the receipts' keys."""

    MISSING = 0
    CONFLICT = 1
    DUPLICATES = 2
    DONE = 3
    EXISTS = 4
    FULL = 5
    OTHER = 6
    PINNED = 7
    NOT_KEPT = 8


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script.

    Attributes:
        source: the source code.
        writes: whether its writes must be durable, so that it needs a WAIT and must not be repeated blindly.
        single: whether it only reads, and only data of one record, the first of its keys.
        digest: the SHA-1 of the source, for EVALSHA.
    """

    source: bytes
    writes: bool = False
    single: bool = False
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = sha1(self.source, usedforsecurity=False).hexdigest()
        object.__setattr__(self, "digest", digest.encode())


def make_script(body: str, *, flags: str = "", writes: bool = False, single: bool = False) -> Script:
    """The script with this body, in which `$NAME` stands for a reply code or a number."""
    codes = {code.name: code.value for code in ReplyCode}
    numbers = {"STAMP_BYTES": STAMP_BYTES, "HEAD_BYTES": HEAD_BYTES, "CONTENDER_SECONDS": CONTENDER_SECONDS}
    lua = Template(body.strip()).substitute(codes, **numbers)
    return Script(f"#!lua{flags}\n{lua}\n".encode(), writes, single)


ALLOW_OOM: Final = " flags=allow-oom"
"""For scripts that need no additional memory."""

OWN: Final = """
local function own(hash, incarnation)  -- the fields of this incarnation
    local found = {}
    for _, field in ipairs(redis.call('HKEYS', hash)) do
        if string.sub(field, 1, 8) == incarnation then found[#found + 1] = field end
    end
    return found
end
"""

TRIM: Final = (
    OWN
    + """
local function newer(one, other)  -- comparing strings would depend on the server's locale
    local high, low = struct.unpack('>I4I4', string.sub(one, 9, 16))
    local other_high, other_low = struct.unpack('>I4I4', string.sub(other, 9, 16))
    return high > other_high or (high == other_high and low > other_low)
end
local function trim(kept, pins, incarnation, keep)  -- of the kept records without a pin, only the newest remain
    local pinned, free = {}, {}
    for _, pin in ipairs(redis.call('HVALS', pins)) do pinned[string.sub(pin, 1, 8)] = true end
    for _, stamp in ipairs(own(kept, incarnation)) do
        if not pinned[string.sub(stamp, 9, 16)] then free[#free + 1] = stamp end
    end
    table.sort(free, newer)
    for i = keep + 1, #free do redis.call('HDEL', kept, free[i]) end
end
"""
)
"""Lua functions for scripts on the history, whose hashes have few fields: the history's length and the pins."""

LOAD: Final = make_script(
    """
-- KEYS: record. ARGV: a stamp, or nothing.
local stamp = redis.call('GETRANGE', KEYS[1], 0, $STAMP_BYTES - 1)
if stamp == '' then return $MISSING end
if stamp == ARGV[1] then return $DONE end
return redis.call('GET', KEYS[1])
""",
    flags=ALLOW_OOM,
    single=True,
)

HEAD: Final = make_script(
    """
-- KEYS: record.
return redis.call('GETRANGE', KEYS[1], 0, $STAMP_BYTES + $HEAD_BYTES - 1)
""",
    flags=ALLOW_OOM,
    single=True,
)

NAMES: Final = make_script(
    """
-- KEYS: names. ARGV: from, to, how many.
return redis.call('ZRANGE', KEYS[1], ARGV[1], ARGV[2], 'BYLEX', 'LIMIT', 0, ARGV[3])
""",
    flags=ALLOW_OOM,
)

COUNT: Final = make_script(
    """
-- KEYS: names.
return redis.call('ZCARD', KEYS[1])
""",
    flags=ALLOW_OOM,
)

CREATE: Final = make_script(
    """
-- KEYS: record, names, floor, kept records, pins, attachments. ARGV: incarnation, commit id, data, name, whether there
-- is room, whether a WAIT follows.
local present = redis.call('GET', KEYS[1])
if present then
    if ARGV[6] == '1' then redis.call('SETRANGE', KEYS[1], 0, string.sub(present, 1, $STAMP_BYTES)) end
    return {$EXISTS, present}
end
if ARGV[5] == '0' then return {$FULL} end
local high, low = 0, 0
local floor = redis.call('GET', KEYS[3])
if floor then high, low = struct.unpack('>I4I4', floor) end
low = low + 1
if low == 4294967296 then high, low = high + 1, 0 end
local version = struct.pack('>I4I4', high, low)
redis.call('SET', KEYS[1], ARGV[1] .. version .. ARGV[2] .. ARGV[3])
redis.call('ZADD', KEYS[2], 0, ARGV[4])
redis.call('UNLINK', KEYS[4], KEYS[5], KEYS[6])  -- which an older release leaves behind
return {$DONE, version}
""",
    writes=True,
)

COMMIT: Final = make_script(
    """
-- KEYS: record, contenders, receipts; to keep the replaced record also kept records, pins. ARGV: expected stamp,
-- the incarnation that the receipts' keys are for, their milliseconds, whether a WAIT follows, how many records to
-- keep, the new record or nothing, the receipts.
local last = #KEYS
if ARGV[5] ~= '0' then last = last - 2 end
local function now()
    local time = redis.call('TIME')
    return time[1] + time[2] / 1000000
end
local stamp = redis.call('GETRANGE', KEYS[1], 0, $STAMP_BYTES - 1)
if stamp == '' then return {$MISSING} end
if last > 2 and string.sub(stamp, 1, 8) ~= ARGV[2] then return {$OTHER, string.sub(stamp, 1, 8)} end
local found = {$DUPLICATES}
for i = 3, last do
    local receipt = redis.call('GET', KEYS[i])
    if receipt then
        found[#found + 1] = i - 3
        found[#found + 1] = receipt
        if ARGV[4] == '1' then  -- one that was moved here may last longer than those that are made here
            redis.call('PEXPIRE', KEYS[i], math.max(tonumber(ARGV[3]), redis.call('PTTL', KEYS[i])))
        end
    end
end
if #found > 1 then return found end
if stamp ~= ARGV[1] then
    if string.sub(stamp, 1, 8) ~= string.sub(ARGV[1], 1, 8) then return {$CONFLICT} end
    if last > 2 then
        redis.set_repl(redis.REPL_NONE)
        redis.call('ZADD', KEYS[2], 'NX', now(), KEYS[3])
        redis.call('PEXPIRE', KEYS[2], 1000 * $CONTENDER_SECONDS)
    end
    return {$CONFLICT, redis.call('GET', KEYS[1])}
end
local contenders = 0
if redis.call('EXISTS', KEYS[2]) == 1 then
    redis.set_repl(redis.REPL_NONE)
    for i = 3, last, 1000 do  -- Lua passes some thousands of arguments, not more
        redis.call('ZREM', KEYS[2], unpack(KEYS, i, math.min(i + 999, last)))
    end
    redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now() - $CONTENDER_SECONDS)
    contenders = redis.call('ZCARD', KEYS[2])
    redis.set_repl(redis.REPL_ALL)
end
if ARGV[5] ~= '0' then
"""
    + TRIM
    + """
    redis.call('HSET', KEYS[last + 1], stamp, redis.call('GETRANGE', KEYS[1], $STAMP_BYTES, -1))
    trim(KEYS[last + 1], KEYS[last + 2], string.sub(stamp, 1, 8), tonumber(ARGV[5]))
end
if ARGV[6] ~= '' then redis.call('SET', KEYS[1], ARGV[6]) end
for i = 3, last do redis.call('SET', KEYS[i], ARGV[4 + i], 'PX', ARGV[3]) end
return {$DONE, contenders}
""",
    writes=True,
)

_FIND: Final = """
-- KEYS: record, receipts. ARGV: incarnation, whether a WAIT follows.
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return {$MISSING} end
local found = {$DONE}
for i = 2, #KEYS do
    local receipt = redis.call('GET', KEYS[i])
    if receipt then
        found[#found + 1] = i - 2
        found[#found + 1] = receipt
        local left = redis.call('PTTL', KEYS[i])
        if ARGV[2] == '1' and left >= 0 then redis.call('PEXPIRE', KEYS[i], math.max(left, 1)) end
    end
end
return found
"""
FIND: Final = make_script(_FIND, flags=ALLOW_OOM, single=True)
FIND_AND_WAIT: Final = make_script(_FIND, flags=ALLOW_OOM, writes=True)

DELETE: Final = make_script(
    OWN
    + """
-- KEYS: record, names, floor, kept records, pins, attachments. ARGV: expected stamp, name, whether a WAIT follows,
-- whether to delete pins too.
local stamp = redis.call('GETRANGE', KEYS[1], 0, $STAMP_BYTES - 1)
local floor = redis.call('GET', KEYS[3])
if stamp ~= ARGV[1] then
    -- Deleted by another try? Then there is a floor.
    if floor and ARGV[3] == '1' then redis.call('SETRANGE', KEYS[3], 0, floor) end
    if stamp == '' then return {$MISSING} end
    return {$CONFLICT}
end
if ARGV[4] == '0' and #own(KEYS[5], string.sub(stamp, 1, 8)) > 0 then return {$PINNED} end
local version = string.sub(stamp, 9, 16)
local high, low = struct.unpack('>I4I4', version)
local floor_high, floor_low = -1, 0
if floor then floor_high, floor_low = struct.unpack('>I4I4', floor) end
if high > floor_high or (high == floor_high and low > floor_low) then redis.call('SET', KEYS[3], version) end
redis.call('UNLINK', KEYS[1], KEYS[4], KEYS[5], KEYS[6])
redis.call('ZREM', KEYS[2], ARGV[2])
return {$DONE}
""",
    flags=ALLOW_OOM,
    writes=True,
)

# JOIN and LEAVE are not marked as writing: they are idempotent, and a group's result is durable by its receipt.
JOIN: Final = make_script(
    """
-- KEYS: record, fingerprints by member and the group's size, parts by member, calls by member. ARGV: incarnation,
-- member, size, fingerprint, part, milliseconds, call.
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return {$MISSING} end
local size = redis.call('HGET', KEYS[2], 'size') or ARGV[3]
local count = math.max(redis.call('HLEN', KEYS[2]) - 1, 0)
local added = 0
if size == ARGV[3] and count < tonumber(size) and redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then
    redis.call('HSET', KEYS[2], ARGV[2], ARGV[4], 'size', size)
    redis.call('HSET', KEYS[3], ARGV[2], ARGV[5])
    redis.call('HSET', KEYS[4], ARGV[2], ARGV[7])
    redis.call('PEXPIRE', KEYS[4], ARGV[6])
    if count == 0 then
        redis.call('PEXPIRE', KEYS[2], ARGV[6])
        redis.call('PEXPIRE', KEYS[3], ARGV[6])
    end
    count = count + 1
end
if redis.call('HGET', KEYS[4], ARGV[2]) == ARGV[7] then added = 1 end  -- by this call, now or before its reply was lost
local parts = {}
if count == tonumber(size) then parts = redis.call('HGETALL', KEYS[3]) end
return {$DONE, added, redis.call('HGETALL', KEYS[2]), parts}
"""
)

LEAVE: Final = make_script(
    """
-- KEYS: as those of a group in JOIN. ARGV: member, or nothing for all.
if ARGV[1] ~= '' then
    redis.call('HDEL', KEYS[1], ARGV[1])
    redis.call('HDEL', KEYS[2], ARGV[1])
    redis.call('HDEL', KEYS[3], ARGV[1])
end
if ARGV[1] == '' or redis.call('HLEN', KEYS[1]) < 2 then redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3]) end
return $DONE
""",
    flags=ALLOW_OOM,
)

IMPORT_RECEIPTS: Final = make_script(
    """
-- KEYS: record, receipts. ARGV: incarnation, then the milliseconds and the bytes of each receipt.
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return $MISSING end
for i = 2, #KEYS do
    if not redis.call('SET', KEYS[i], ARGV[2 * i - 1], 'PX', ARGV[2 * i - 2], 'NX') then
        redis.call('PEXPIRE', KEYS[i], redis.call('PTTL', KEYS[i]))  -- for a WAIT
    end
end
return $DONE
""",
    writes=True,
)

# Not marked as writing: if the key is lost in a failover, the next process sets it again.
SCHEMA: Final = make_script(
    """
-- KEYS: schema. ARGV: the version to note where there is none.
redis.call('TIME')  -- a user that may not ask for it is to be refused now, and not at the first lost race
redis.call('SET', KEYS[1], ARGV[1], 'NX')
return redis.call('GET', KEYS[1])
"""
)
