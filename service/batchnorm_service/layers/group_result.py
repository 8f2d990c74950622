"""How a closed group is kept: the payload of its receipt."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from .idempotency import KEY_BYTES

_HEAD: Final = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What is left of a group.

    Attributes:
        size: how many members it was to have.
        members: the keys of those that came, with the fingerprints of their shards.
        totals: the merged parts; empty when the group gave up waiting.
    """

    size: int
    members: dict[bytes, bytes]
    totals: bytes

    def pack(self) -> bytes:
        """As bytes: size and number of members, 32 bytes a member, the totals."""
        pairs = b"".join(key + fingerprint for key, fingerprint in self.members.items())
        return _HEAD.pack(self.size, len(self.members)) + pairs + self.totals

    @staticmethod
    def unpack(payload: bytes) -> GroupResult:
        """The inverse of `pack`."""
        size, came = _HEAD.unpack_from(payload)
        start, step = _HEAD.size, 2 * KEY_BYTES
        pairs = [payload[at : at + step] for at in range(start, start + came * step, step)]
        members = {pair[:KEY_BYTES]: pair[KEY_BYTES:] for pair in pairs}
        return GroupResult(size, members, payload[start + came * step :])
