"""Attachments of records in a Valkey store."""

from __future__ import annotations

from typing import Final

from batchnorm_service.store.base import Attachment, Committed, Conflict, Missing
from batchnorm_service.store.valkey.commands import CommandRunner
from batchnorm_service.store.valkey.keys import Keys, bucket_of, pack_number, unpack_number
from batchnorm_service.store.valkey.scripts import ALLOW_OOM, ReplyCode, make_script

_LOAD: Final = make_script(
    """
-- KEYS: record, attachments. ARGV: incarnation, key.
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return $MISSING end
return redis.call('HGET', KEYS[2], ARGV[1] .. ARGV[2]) or $NOT_KEPT
""",
    flags=ALLOW_OOM,
    single=True,
)

_ATTACH: Final = make_script(
    """
-- KEYS: record, attachments. ARGV: incarnation, key, the expected commit id or nothing, the new commit id, data.
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return $MISSING end
local found = string.sub(redis.call('HGET', KEYS[2], ARGV[1] .. ARGV[2]) or '', 1, 8)
if found ~= ARGV[3] and found ~= ARGV[4] then return $CONFLICT end
redis.call('HSET', KEYS[2], ARGV[1] .. ARGV[2], ARGV[4] .. ARGV[5])
return $DONE
""",
    writes=True,
)


async def load(runner: CommandRunner, keys: Keys, name: str, incarnation: int, key: str) -> Attachment | Missing | None:
    """See `Store.attachment`."""
    own = [keys.record(name), keys.attachments(name)]
    reply = await runner.run(_LOAD, bucket_of(name), own, [pack_number(incarnation), key.encode()])
    if isinstance(reply, bytes):
        return Attachment(unpack_number(reply[:8]), reply[8:])
    return Missing() if reply == ReplyCode.MISSING else None


async def attach(
    runner: CommandRunner, keys: Keys, name: str, incarnation: int, key: str, new: Attachment, expected: int | None
) -> Committed | Conflict | Missing:
    """See `Store.attach`."""
    own = [keys.record(name), keys.attachments(name)]
    before = b"" if expected is None else pack_number(expected)
    args = [pack_number(incarnation), key.encode(), before, pack_number(new.commit_id), new.data]
    reply = await runner.run(_ATTACH, bucket_of(name), own, args)
    if reply == ReplyCode.MISSING:
        return Missing()
    return Committed() if reply == ReplyCode.DONE else Conflict()
