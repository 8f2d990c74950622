"""The result of a closed group, stored as the payload of its receipt."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from .idempotency import KEY_BYTES

_HEAD: Final = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class GroupResult:
    """Result of a closed group.

    Attributes:
        size: how many members it was opened for.
        members: fingerprints of the members' shards, by key.
        totals: the merged parts; empty if the group timed out.
    """

    size: int
    members: dict[bytes, bytes]
    totals: bytes

    def pack(self) -> bytes:
        """Serialize: size and number of members, 32 bytes per member, the totals."""
        pairs = b"".join(key + fingerprint for key, fingerprint in self.members.items())
        return _HEAD.pack(self.size, len(self.members)) + pairs + self.totals

    @staticmethod
    def unpack(payload: bytes) -> GroupResult:
        """The inverse of `pack`. Raises `ValueError` when it is damaged."""
        if len(payload) < _HEAD.size:
            raise ValueError(f"the result of a group has {len(payload)} bytes, at least {_HEAD.size} are needed")
        size, count = _HEAD.unpack_from(payload)
        step = 2 * KEY_BYTES
        end = _HEAD.size + count * step
        if len(payload) < end:
            raise ValueError(f"the result of a group has {len(payload)} bytes, not {end} for its {count} members")
        pairs = [payload[at : at + step] for at in range(_HEAD.size, end, step)]
        return GroupResult(size, {pair[:KEY_BYTES]: pair[KEY_BYTES:] for pair in pairs}, payload[end:])
