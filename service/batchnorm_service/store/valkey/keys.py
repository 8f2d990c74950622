"""How layers are laid out in Valkey: buckets, keys, and the bytes of records and receipts.

Every layer belongs to one of 256 buckets by a hash of its name, and every key of a bucket has the bucket's hash tag:
a bucket is one hash slot, so that a script may touch a layer's record, its receipts and the index at once, on a
Cluster too. 256 are few enough to be asked one by one for a listing, and enough to be spread over: each primary gets
an even share of them, because the tags are chosen so that bucket i's slot is one of 64 i to 64 i + 63.

    PREFIX:{TAG}l:NAME   a record: the stamp's 24 bytes, then the data
    PREFIX:{TAG}c:NAME   the commits that lost a race for the record and wait, by when; it expires, and is on no replica
    PREFIX:{TAG}r:...    a receipt: the incarnation's 8 bytes and the receipt's own 16; it expires by itself
    PREFIX:{TAG}g:...    who has come to a group: the incarnation's 8 bytes and the group's own 16; it expires, too
    PREFIX:{TAG}p:...    and what they have brought
    PREFIX:{TAG}j:...    and by which call: a call that is sent twice, because its reply was lost, knows its own shard
    PREFIX:{TAG}names    the names in the bucket: a sorted set in the order of their bytes
    PREFIX:{TAG}floor    the largest version that any deleted layer of the bucket had: a new one starts above it
    PREFIX:{TAG}schema   in bucket 0 only: the version of this layout

Releases that know other keys run beside each other: a new key is an addition that older ones neither read nor need.
`j:` is such a key; they leave it behind, and it expires.

Receipts of a deleted layer are never met again, because the next one has another incarnation: deleting takes as long
however many there are. They are keys of their own, not fields of a hash, because fields that expire need Redis 7.4 or
Valkey 9, and keys that expire work everywhere and are removed in small steps by the server.
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
    """The bucket that a layer belongs to, for ever."""
    return crc32(name.encode()) % BUCKETS


class Keys:
    """The names of keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self._bases = tuple(b"%b:{%b}" % (self._prefix, tag) for tag in TAGS)
        self._receipts = re.compile(rb"%b:\{[0-9a-f]+\}r:(.{8})(.{16})" % re.escape(self._prefix), re.DOTALL)

    def record(self, name: str) -> bytes:
        """Of a layer's record."""
        return self._bases[bucket_of(name)] + b"l:" + name.encode()

    def losers(self, name: str) -> bytes:
        """Of the commits that lost a race for a layer."""
        return self._bases[bucket_of(name)] + b"c:" + name.encode()

    def receipt(self, name: str, incarnation: int, key: bytes) -> bytes:
        """Of a receipt."""
        return self._bases[bucket_of(name)] + b"r:" + _NUMBER.pack(incarnation) + key

    def any_receipt(self) -> bytes:
        """A pattern that every receipt's key matches, and some other keys may."""
        return b"%b:{*}r:*" % self._prefix

    def receipt_of(self, key: bytes) -> tuple[int, bytes] | None:
        """The inverse of `receipt`: the incarnation and the receipt's own key; None for other keys."""
        match = self._receipts.fullmatch(key)
        return None if match is None else (unpack_number(match[1]), match[2])

    def group(self, name: str, incarnation: int, key: bytes) -> tuple[bytes, bytes, bytes]:
        """Of a group's members, of their parts, and of the calls that brought them."""
        base, own = self._bases[bucket_of(name)], _NUMBER.pack(incarnation) + key
        return base + b"g:" + own, base + b"p:" + own, base + b"j:" + own

    def names(self, bucket: int) -> bytes:
        """Of a bucket's index."""
        return self._bases[bucket] + b"names"

    def floor(self, bucket: int) -> bytes:
        """Of a bucket's largest deleted version."""
        return self._bases[bucket] + b"floor"

    def schema(self) -> bytes:
        """Of the version of the layout."""
        return self._bases[0] + b"schema"


def pack_number(number: int) -> bytes:
    """A number of a stamp."""
    return _NUMBER.pack(number)


def unpack_number(data: bytes) -> int:
    """The inverse of `pack_number`."""
    number: int = _NUMBER.unpack(data)[0]
    return number


def pack_stamp(stamp: Stamp) -> bytes:
    """The bytes before a record's data."""
    return _STAMP.pack(*stamp)


def unpack_record(data: bytes) -> Record:
    """The inverse of `pack_stamp(stamp) + data`."""
    return Record(Stamp(*_STAMP.unpack_from(data)), data[STAMP_BYTES:])


def pack_receipt(receipt: Receipt) -> bytes:
    """All of a receipt but its key."""
    return _RECEIPT.pack(*receipt[1:4]) + receipt.payload


def unpack_receipt(key: bytes, data: bytes) -> Receipt:
    """The inverse of `pack_receipt`."""
    fingerprint, version, batch = _RECEIPT.unpack_from(data)
    return Receipt(key, fingerprint, version, batch, data[_RECEIPT.size :])
