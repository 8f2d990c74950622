"""Parses moments of many layers in one JSON document, layer by layer: a single parser call would hold the GIL long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from batchnorm_client.wire.errors import MalformedBody, ProblemError
from batchnorm_client.wire.media_types import JSON
from batchnorm_client.wire.tensors import Tensor, decode
from batchnorm_service.layers import MOMENT_DTYPES


def read_each_layer(
    body: bytes | bytearray | memoryview, max_layers: int
) -> dict[str, Mapping[str, Tensor] | ProblemError] | None:
    """Moments (or the problem with them) by layer, for a body of the usual structure.

    The text is `{"layers": {name: {...}, ...}}`. Each innermost object is replaced by its index, with blanks around it
    so that it cannot merge with the adjacent text. The rest is then parsed: if its values are exactly these indexes,
    each once, they tell which object belongs to which name.

    Args:
        body: the JSON text.
        max_layers: bodies with more layers are not parsed here.

    Returns:
        None if the body is structured differently: the caller then parses it as a whole.
    """
    raw = np.frombuffer(body, np.uint8)
    is_brace = (raw == ord("{")) | (raw == ord("}"))
    if not 6 <= np.count_nonzero(is_brace) <= 2 * max_layers + 4:
        return None
    braces = np.flatnonzero(is_brace)
    count = len(braces) // 2 - 2
    if raw[braces].tobytes() != b"{{" + b"{}" * count + b"}}":
        return None
    starts, ends = braces[2:-2:2].tolist(), (braces[3:-2:2] + 1).tolist()
    view = memoryview(body)
    between = [bytes(view[begin:end]) for begin, end in zip([0, *ends], [*starts, len(view)], strict=True)]
    numbered = [b"%b %d " % (text, n) for n, text in enumerate(between[:-1])]
    layers = _layers(b"".join([*numbered, between[-1]]), count)
    if layers is None:
        return None
    try:
        return {name: _moments(view[starts[n] : ends[n]]) for name, n in layers.items()}
    except MalformedBody:
        return None


def _moments(text: memoryview) -> Mapping[str, Tensor] | ProblemError:
    try:
        return decode(JSON, text, MOMENT_DTYPES)
    except MalformedBody:
        raise  # the whole document is invalid JSON
    except ProblemError as error:
        return error


def _layers(frame: bytes, count: int) -> dict[str, int] | None:
    try:
        document: Any = orjson.loads(frame)
    except orjson.JSONDecodeError:
        return None
    layers = document.get("layers") if isinstance(document, dict) and len(document) == 1 else None
    if not isinstance(layers, dict) or not all(type(n) is int for n in layers.values()):
        return None
    return layers if sorted(layers.values()) == list(range(count)) else None
