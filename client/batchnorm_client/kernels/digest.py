"""The digest of a layer's state: equal digests mean that eval gives the same output."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

DIGEST_PATTERN: Final = re.compile(r"sha-256:[0-9a-f]{64}")
"""A digest as text."""

DIGEST_RULE: Final = "digest: sha-256: and 64 hexadecimal digits in lower case"
"""The pattern in words, to follow "is no"."""


def state_digest(
    dtype: str, channel_axis: int, eps: float, clip: float | None, vectors: Iterable[npt.NDArray[Any] | None]
) -> str:
    """`sha-256:` and the hex SHA-256 (FIPS 180-4) of what eval computes with.

    Args:
        dtype: of the state, such as "float32".
        channel_axis: as in the layer's config.
        eps: as in the layer's config.
        clip: as in the layer's config.
        vectors: running_mean, running_var, weight and bias, (C,) in the layer's dtype; None if the layer lacks it.
    """
    digest = hashlib.sha256(b"batchnorm-state-1\n%b\n%d\n" % (dtype.encode(), channel_axis))
    digest.update(struct.pack("<d", eps))
    digest.update(b"\0" if clip is None else struct.pack("<Bd", 1, clip))
    for vector in vectors:
        if vector is None:
            digest.update(b"\0")
        else:
            digest.update(struct.pack("<BQ", 1, len(vector)))
            digest.update(np.ascontiguousarray(vector, vector.dtype.newbyteorder("<")).data)
    return f"sha-256:{digest.hexdigest()}"
