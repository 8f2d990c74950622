"""Names for folds: what a receipt is filed under, and what tells one batch from another."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import xxhash

from batchnorm_client.wire.tensors import Tensor

from ..runtime import Runtime
from ..store.base import Receipt

KEY_BYTES = 16
NO_FINGERPRINT = bytes(KEY_BYTES)
"""Of a call without a key, which nobody can repeat."""


class IdempotencyToken(NamedTuple):
    """The claim of one change to be made exactly once.

    Attributes:
        key: 16 bytes, the digest of the caller's Idempotency-Key, or the time and random bits.
        fingerprint: 16 bytes, of what the caller asked for.
        from_caller: whether the caller gave the key. (A change without one has a receipt all the same: it tells what
            became of a commit whose reply was lost.)
    """

    key: bytes
    fingerprint: bytes
    from_caller: bool

    def receipt(self, version: int, batch: int, payload: bytes = b"") -> Receipt:
        """The receipt to be written with the change."""
        return Receipt(self.key, self.fingerprint, version, batch, payload)


def token(runtime: Runtime, key: str | None, operation: str, *tensors: Tensor) -> IdempotencyToken:
    """The token of a call; the fingerprint covers operation, dtypes, shapes and bytes, whatever the form on the wire.

    Args:
        runtime: for a key where the caller gave none.
        key: the caller's Idempotency-Key.
        operation: what the call does, with everything that makes it another call.
        tensors: the batch.
    """
    if key is None:
        # Never the same twice, but not hard to guess: os.urandom would be a system call. Ascending, as in a UUID of
        # version 7 (RFC 9562, 5.7), because a store keeps what ascends with less work.
        milliseconds = int(1000 * runtime.wall()).to_bytes(6, "big")
        return IdempotencyToken(milliseconds + runtime.bytes(KEY_BYTES - 6), NO_FINGERPRINT, from_caller=False)
    digest = xxhash.xxh3_128(f"{operation}\0".encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}\0{tensor.shape}\0".encode())
        digest.update(tensor.buffer)
    return IdempotencyToken(_digest(key), digest.digest(), from_caller=True)


def group_token(operation: str, group: str) -> IdempotencyToken:
    """The token of a group as a whole. No caller's key can be the same: keys have no spaces."""
    return IdempotencyToken(_digest(f"group {operation} {group}"), NO_FINGERPRINT, from_caller=True)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=KEY_BYTES).digest()
