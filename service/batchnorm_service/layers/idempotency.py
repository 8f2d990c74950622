"""Idempotency tokens: the key under which a receipt is stored, and the fingerprint of the call."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import xxhash

from batchnorm_client.wire.tensors import Tensor

from ..runtime import Runtime
from ..store.base import Receipt

KEY_BYTES = 16
NO_FINGERPRINT = bytes(KEY_BYTES)
"""The fingerprint of calls without a caller's key, which cannot be retried."""


class IdempotencyToken(NamedTuple):
    """Identity of one update, which is applied at most once.

    Attributes:
        key: 16 bytes: the digest of the caller's Idempotency-Key, or the time and random bits.
        fingerprint: 16 bytes: the digest of the operation and its tensors.
        from_caller: whether the caller provided the key. (Updates without one have receipts too, to find out whether a
            commit with a lost reply took effect.)
    """

    key: bytes
    fingerprint: bytes
    from_caller: bool

    def receipt(self, version: int, batch: int, payload: bytes = b"") -> Receipt:
        """The receipt to write with the update."""
        return Receipt(self.key, self.fingerprint, version, batch, payload)


def make_token(runtime: Runtime, key: str | None, operation: str, *tensors: Tensor) -> IdempotencyToken:
    """The token of a call. Its fingerprint covers operation, dtypes, shapes and bytes, whatever the media type was.

    Args:
        runtime: clock and random numbers, for calls without a key.
        key: the caller's Idempotency-Key, or None.
        operation: the operation's name and parameters.
        tensors: the call's tensors.
    """
    if key is None:
        # Unique but not secret: os.urandom would cost a system call. Ascending like a UUID of version 7 (RFC 9562,
        # 5.7), because ascending keys are cheaper to insert into an index.
        milliseconds = int(1000 * runtime.wall()).to_bytes(6, "big")
        return IdempotencyToken(milliseconds + runtime.bytes(KEY_BYTES - 6), NO_FINGERPRINT, from_caller=False)
    digest = xxhash.xxh3_128(f"{operation}\0".encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}\0{tensor.shape}\0".encode())
        digest.update(tensor.buffer)
    return IdempotencyToken(_digest(key), digest.digest(), from_caller=True)


def group_token(operation: str, group: str) -> IdempotencyToken:
    """The token of a group as a whole. It differs from any caller's key, because keys contain no spaces."""
    return IdempotencyToken(_digest(f"group {operation} {group}"), NO_FINGERPRINT, from_caller=True)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=KEY_BYTES).digest()
