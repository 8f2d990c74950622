"""Layout of the store in Valkey: buckets, keys, and the encoding of records and receipts.

A layer belongs to one of 256 buckets, by a hash of its name. All keys of a bucket have the same hash tag and thus the
same hash slot, so that a script can use a layer's record, its receipts and the index, on a Cluster too. 256 buckets are
few enough to query all for a listing, and enough to be spread evenly over the primaries: the tags are chosen so that
bucket i's slot is one of 64 i to 64 i + 63.

    PREFIX:{TAG}l:NAME   a record: 24 bytes of stamp, then the data
    PREFIX:{TAG}c:NAME   the record's contenders: commits that had a conflict, by time; expires, and is not replicated
    PREFIX:{TAG}h:NAME   the kept records: a hash of the data by the stamp of 24 bytes
    PREFIX:{TAG}i:NAME   the pins: a hash of 8 bytes of version and the data, by 8 bytes of incarnation and the tag
    PREFIX:{TAG}a:NAME   the attachments: a hash of 8 bytes of commit id and data, by 8 bytes of incarnation and the key
    PREFIX:{TAG}r:...    a receipt: 8 bytes of incarnation and the receipt's key of 16 bytes; expires
    PREFIX:{TAG}g:...    a group's members: 8 bytes of incarnation and the group's key of 16 bytes; expires
    PREFIX:{TAG}p:...    the members' parts
    PREFIX:{TAG}j:...    the ids of the calls that added them: a call repeated after a lost reply recognizes its shard
    PREFIX:{TAG}names    the names in the bucket: a sorted set in byte order
    PREFIX:{TAG}floor    the largest version of any deleted layer of the bucket: new layers start above it
    PREFIX:{TAG}schema   in bucket 0 only: the version of this layout

Releases may run side by side: a newer release may add keys that older ones neither read nor need. `j:` is such a key;
older releases do not delete it, and it expires. `h:`, `i:` and `a:` are others: when an older release deletes a layer,
they stay, and its pins do not prevent that. Their fields begin with the incarnation, so that a later layer of that name
does not see them, and a create removes them.

Receipts of a deleted layer can never match again, because the next layer of that name has another incarnation. So
deleting is O(1). Receipts are separate keys, not fields of a hash, because expiring fields need Redis 7.4 or Valkey 9,
while expiring keys work everywhere and are removed by the server in small steps.
"""

from __future__ import annotations

import re
import struct
from binascii import crc_hqx
from typing import Final
from zlib import crc32

from batchnorm_service.store.base import Receipt, Record, Stamp

BUCKETS: Final = 256
SLOTS: Final = 16384
STAMP_BYTES: Final = 24
SCHEMA_VERSION: Final = 1

_NUMBER: Final = struct.Struct(">q")
_STAMP: Final = struct.Struct(">qqq")
_RECEIPT: Final = struct.Struct(">16sqq")


def _slot(tag: bytes) -> int:
    return crc_hqx(tag, 0) % SLOTS


def _tags() -> tuple[bytes, ...]:
    tags: dict[int, bytes] = {}
    number = 0
    while len(tags) < BUCKETS:
        tag = b"%x" % number
        tags.setdefault(_slot(tag) * BUCKETS // SLOTS, tag)
        number += 1
    return tuple(tags[bucket] for bucket in range(BUCKETS))


TAGS: Final = _tags()
BUCKET_SLOTS: Final = tuple(map(_slot, TAGS))


def bucket_of(name: str) -> int:
    """The bucket of a layer. Must never change, since stored layers depend on it."""
    return crc32(name.encode()) % BUCKETS


class Keys:
    """Names of the keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self._bases = tuple(b"%b:{%b}" % (self._prefix, tag) for tag in TAGS)
        self._receipts = re.compile(rb"%b:\{[0-9a-f]+\}r:(.{8})(.{16})" % re.escape(self._prefix), re.DOTALL)

    def record(self, name: str) -> bytes:
        """The key of a layer's record."""
        return self._bases[bucket_of(name)] + b"l:" + name.encode()

    def contenders(self, name: str) -> bytes:
        """The key of a layer's contenders."""
        return self._bases[bucket_of(name)] + b"c:" + name.encode()

    def history(self, name: str) -> tuple[bytes, bytes]:
        """The keys of a layer's kept records and of its pins."""
        base, own = self._bases[bucket_of(name)], name.encode()
        return base + b"h:" + own, base + b"i:" + own

    def attachments(self, name: str) -> bytes:
        """The key of a layer's attachments."""
        return self._bases[bucket_of(name)] + b"a:" + name.encode()

    def receipt(self, name: str, incarnation: int, key: bytes) -> bytes:
        """The key of a receipt."""
        return self._bases[bucket_of(name)] + b"r:" + _NUMBER.pack(incarnation) + key

    def any_receipt(self) -> bytes:
        """A pattern that matches all receipts' keys, and perhaps other keys."""
        return b"%b:{*}r:*" % self._prefix

    def receipt_of(self, key: bytes) -> tuple[int, bytes] | None:
        """The inverse of `receipt`: the incarnation and the receipt's own key; None if it is not a receipt's key."""
        match = self._receipts.fullmatch(key)
        return None if match is None else (unpack_number(match[1]), match[2])

    def group(self, name: str, incarnation: int, key: bytes) -> tuple[bytes, bytes, bytes]:
        """The keys of a group's members, of their parts, and of the calls that added them."""
        base, own = self._bases[bucket_of(name)], _NUMBER.pack(incarnation) + key
        return base + b"g:" + own, base + b"p:" + own, base + b"j:" + own

    def names(self, bucket: int) -> bytes:
        """The key of a bucket's index of names."""
        return self._bases[bucket] + b"names"

    def floor(self, bucket: int) -> bytes:
        """The key of a bucket's largest deleted version."""
        return self._bases[bucket] + b"floor"

    def schema(self) -> bytes:
        """The key of the layout's version."""
        return self._bases[0] + b"schema"


def pack_number(number: int) -> bytes:
    """Encode a number of a stamp in 8 bytes."""
    return _NUMBER.pack(number)


def unpack_number(data: bytes) -> int:
    """The inverse of `pack_number`."""
    number: int = _NUMBER.unpack(data)[0]
    return number


def pack_stamp(stamp: Stamp) -> bytes:
    """Encode a stamp, the first 24 bytes of a record."""
    return _STAMP.pack(*stamp)


def unpack_stamp(data: bytes) -> Stamp:
    """The inverse of `pack_stamp`."""
    return Stamp(*_STAMP.unpack(data))


def unpack_record(data: bytes) -> Record:
    """The inverse of `pack_stamp(stamp) + data`."""
    return Record(Stamp(*_STAMP.unpack_from(data)), data[STAMP_BYTES:])


def pack_receipt(receipt: Receipt) -> bytes:
    """Encode a receipt without its key."""
    return _RECEIPT.pack(*receipt[1:4]) + receipt.payload


def unpack_receipt(key: bytes, data: bytes) -> Receipt:
    """The inverse of `pack_receipt`."""
    fingerprint, version, batch = _RECEIPT.unpack_from(data)
    return Receipt(key, fingerprint, version, batch, data[_RECEIPT.size :])
