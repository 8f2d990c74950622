"""Kept records and pins of a Valkey store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from batchnorm_service.store.base import (
    Committed,
    Full,
    Missing,
    NotKept,
    Pin,
    Pinned,
    Record,
    Stamp,
    Unchanged,
)
from batchnorm_service.store.valkey.commands import CommandRunner
from batchnorm_service.store.valkey.keys import (
    Keys,
    bucket_of,
    pack_number,
    pack_stamp,
    unpack_number,
    unpack_record,
    unpack_stamp,
)
from batchnorm_service.store.valkey.scripts import ALLOW_OOM, OWN, TRIM, ReplyCode, Script, make_script

_FIND: Final = (
    OWN
    + """
local function find(newest, version)  -- the stamp of the newest or kept record of a version
    if string.sub(newest, 9, 16) == version then return newest end
    for _, stamp in ipairs(own(KEYS[2], string.sub(newest, 1, 8))) do
        if string.sub(stamp, 9, 16) == version then return stamp end
    end
    return nil
end
local function read(newest, stamp)
    if newest == stamp then return redis.call('GETRANGE', KEYS[1], $STAMP_BYTES, -1) end
    return redis.call('HGET', KEYS[2], stamp)
end
"""
)

KEPT: Final = make_script(
    OWN
    + """
-- KEYS: record, kept records.
local incarnation = redis.call('GETRANGE', KEYS[1], 0, 7)
if incarnation == '' then return $MISSING end
return own(KEYS[2], incarnation)
""",
    flags=ALLOW_OOM,
    single=True,
)

LOAD_KEPT: Final = make_script(
    _FIND
    + """
-- KEYS: record, kept records, pins. ARGV: a version or nothing, a tag, a stamp or nothing.
local newest = redis.call('GETRANGE', KEYS[1], 0, $STAMP_BYTES - 1)
if newest == '' then return $MISSING end
local version = ARGV[1]
if version == '' then
    local pin = redis.call('HGET', KEYS[3], string.sub(newest, 1, 8) .. ARGV[2])
    if not pin then return $NOT_KEPT end
    version = string.sub(pin, 1, 8)
end
local stamp = find(newest, version)
if not stamp then return $NOT_KEPT end
if stamp == ARGV[3] then return $DONE end
return stamp .. read(newest, stamp)
""",
    flags=ALLOW_OOM,
    single=True,
)

PIN: Final = make_script(
    _FIND
    + """
-- KEYS: record, kept records, pins. ARGV: stamp or nothing, tag, data, how many pins are allowed, whether a WAIT
-- follows.
local newest = redis.call('GETRANGE', KEYS[1], 0, $STAMP_BYTES - 1)
if newest == '' then return {$MISSING} end
local wanted = ARGV[1]
if wanted == '' then wanted = newest end
local incarnation, version = string.sub(wanted, 1, 8), string.sub(wanted, 9, 16)
if string.sub(newest, 1, 8) ~= incarnation then return {$MISSING} end
local pin = redis.call('HGET', KEYS[3], incarnation .. ARGV[2])
if pin then
    if ARGV[5] == '1' then redis.call('HSET', KEYS[3], incarnation .. ARGV[2], pin) end
    return {$PINNED, pin}
end
if find(newest, version) ~= wanted then return {$NOT_KEPT} end
if #own(KEYS[3], incarnation) >= tonumber(ARGV[4]) then return {$FULL} end
if newest == wanted then redis.call('HSET', KEYS[2], newest, read(newest, newest)) end
redis.call('HSET', KEYS[3], incarnation .. ARGV[2], version .. ARGV[3])
return {$DONE, wanted .. redis.call('HGET', KEYS[2], wanted)}
""",
    writes=True,
)

PINS: Final = make_script(
    OWN
    + """
-- KEYS: record, pins.
local incarnation = redis.call('GETRANGE', KEYS[1], 0, 7)
if incarnation == '' then return $MISSING end
local found = own(KEYS[2], incarnation)
for i = 1, #found do found[i] = {string.sub(found[i], 9), redis.call('HGET', KEYS[2], found[i])} end
return found
""",
    flags=ALLOW_OOM,
    single=True,
)

UNPIN: Final = make_script(
    TRIM
    + """
-- KEYS: record, kept records, pins. ARGV: incarnation, tag, how many records to keep, whether a WAIT follows.
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return $MISSING end
if redis.call('HDEL', KEYS[3], ARGV[1] .. ARGV[2]) == 0 then
    -- Removed by another try? Its write is older than this one.
    if ARGV[4] == '1' then redis.call('SETRANGE', KEYS[1], 0, ARGV[1]) end
    return $NOT_KEPT
end
trim(KEYS[2], KEYS[3], ARGV[1], tonumber(ARGV[3]))
return $DONE
""",
    flags=ALLOW_OOM,
    writes=True,
)

IMPORT_HISTORY: Final = make_script(
    _FIND
    + """
-- KEYS: record, kept records, pins. ARGV: incarnation, how many records, the stamp and the data of each; the tag of
-- each pin, and its version and data.
local newest = redis.call('GETRANGE', KEYS[1], 0, $STAMP_BYTES - 1)
if string.sub(newest, 1, 8) ~= ARGV[1] then return $MISSING end
local pins = 3 + 2 * tonumber(ARGV[2])
for i = 3, pins - 1, 2 do
    for _, stamp in ipairs(own(KEYS[2], ARGV[1])) do
        if string.sub(stamp, 9, 16) == string.sub(ARGV[i], 9, 16) then redis.call('HDEL', KEYS[2], stamp) end
    end
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
for i = pins, #ARGV, 2 do
    if string.sub(newest, 9, 16) == string.sub(ARGV[i + 1], 1, 8) then
        redis.call('HSET', KEYS[2], newest, read(newest, newest))
    end
    redis.call('HSET', KEYS[3], ARGV[1] .. ARGV[i], ARGV[i + 1])
end
return $DONE
""",
    writes=True,
)


class History:
    """The operations of the store protocol on kept records and pins.

    Args:
        runner: runs the scripts.
        keys: names of the keys.
        waits: 1 if a WAIT follows scripts that write, else 0.
    """

    def __init__(self, runner: CommandRunner, keys: Keys, waits: int) -> None:
        self._runner = runner
        self._keys = keys
        self._waits = waits

    async def kept(self, name: str) -> tuple[Stamp, ...] | Missing:
        """See `Store.kept`."""
        keys = [self._keys.record(name), self._keys.history(name)[0]]
        reply = await self._runner.run(KEPT, bucket_of(name), keys)
        if reply == ReplyCode.MISSING:
            return Missing()
        return tuple(sorted(map(unpack_stamp, reply), key=lambda stamp: stamp.version, reverse=True))

    async def load_kept(self, name: str, at: int | str, unless: Stamp | None) -> Record | Unchanged | NotKept | Missing:
        """See `Store.load_kept`."""
        version, tag = (pack_number(at), b"") if isinstance(at, int) else (b"", at.encode())
        known = pack_stamp(unless) if unless else b""
        reply = await self._run(LOAD_KEPT, name, [version, tag, known])
        if isinstance(reply, bytes):
            return unpack_record(reply)
        return Unchanged() if reply == ReplyCode.DONE else _none(reply)

    async def pin(
        self, name: str, stamp: Stamp | None, tag: str, data: bytes, limit: int
    ) -> Committed | Pinned | Full | NotKept | Missing:
        """See `Store.pin`."""
        reply = await self._run(
            PIN, name, [pack_stamp(stamp) if stamp else b"", tag.encode(), data, limit, self._waits]
        )
        match reply[0]:
            case ReplyCode.DONE:
                return Committed(pinned=unpack_record(reply[1]))
            case ReplyCode.PINNED:
                return Pinned(_unpack_pin(tag.encode(), reply[1]))
            case ReplyCode.FULL:
                return Full()
            case code:
                return _none(code)

    async def pins(self, name: str) -> tuple[Pin, ...] | Missing:
        """See `Store.pins`."""
        keys = [self._keys.record(name), self._keys.history(name)[1]]
        reply = await self._runner.run(PINS, bucket_of(name), keys)
        if reply == ReplyCode.MISSING:
            return Missing()
        return tuple(_unpack_pin(tag, data) for tag, data in sorted(reply))

    async def unpin(self, name: str, incarnation: int, tag: str, keep: int) -> Committed | NotKept | Missing:
        """See `Store.unpin`."""
        reply = await self._run(UNPIN, name, [pack_number(incarnation), tag.encode(), keep, self._waits])
        return Committed() if reply == ReplyCode.DONE else _none(reply)

    async def import_history(
        self, name: str, incarnation: int, kept: Sequence[Record], pins: Sequence[Pin]
    ) -> Committed | Missing:
        """See `Store.import_history`."""
        args: list[bytes | int] = [pack_number(incarnation), len(kept)]
        for record in kept:
            args += [pack_stamp(record.stamp._replace(incarnation=incarnation)), record.data]
        for tag, version, data in pins:
            args += [tag.encode(), pack_number(version) + data]
        reply = await self._run(IMPORT_HISTORY, name, args)
        return Committed() if reply == ReplyCode.DONE else Missing()

    async def _run(self, script: Script, name: str, args: Sequence[bytes | int]) -> Any:
        keys = [self._keys.record(name), *self._keys.history(name)]
        return await self._runner.run(script, bucket_of(name), keys, args)


def _none(code: int) -> NotKept | Missing:
    return NotKept() if code == ReplyCode.NOT_KEPT else Missing()


def _unpack_pin(tag: bytes, data: bytes) -> Pin:
    return Pin(tag.decode(), unpack_number(data[:8]), data[8:])
