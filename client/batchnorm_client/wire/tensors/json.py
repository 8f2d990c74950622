"""Tensors in JSON: nested lists of numbers; non-finite ones are the strings "NaN", "Infinity" and "-Infinity".

Parsers and writers of JSON hold the GIL from their first byte to their last. Large texts are therefore
read and written in pieces, so that other threads, such as the event loop's, need not wait for a whole body.

There are two readers. The fast one, for large bodies, is `regular_json`. Bodies that it does not accept go to the
second one, here: orjson in one call, which accepts the same bodies and alone decides what is refused and why. The
writer is `json_writer`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any, Final

import numpy as np
import orjson

from batchnorm_client.wire.errors import InvalidRequest, MalformedBody, RequestError, ShapeMismatch
from batchnorm_client.wire.tensors.json_writer import json_pieces
from batchnorm_client.wire.tensors.regular_json import (
    LONGEST_NUMBER,
    MOST_MEMBERS,
    NON_FINITE,
    PIECE_BYTES,
    UnusualError,
    members,
    read_lists,
    read_regular,
    rounded,
)
from batchnorm_client.wire.tensors.tensor import MAX_RANK, Array, Buffer, Tensor, byte_view, check_known

_FAST_FROM: Final = 1024  # bytes; below, one call of orjson is as fast
_MOST_VALUES: Final = 1 << 18  # lists, objects and others, that orjson reads with one call: some 30 ms and 30 MB


def decode_json(body: Buffer, dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a JSON object, each in the dtype that `dtypes` names: float32, float64 or int64.

    Numbers are read as float64, then rounded; integers may have any size. If a key occurs twice, the last one is used,
    as most JSON readers do.

    Raises:
        MalformedBody: not JSON, or not an object.
        InvalidRequest: a tensor that is not known, an element that is not a number, a number that does not fit.
        ShapeMismatch: ragged lists, or more than 64 dimensions.
    """
    raw, refusal = byte_view(body), None
    if len(raw) >= _FAST_FROM:
        try:
            return {name: Tensor.of(array) for name, array in read_regular(raw, dtypes).items()}
        except UnusualError as unusual:
            refusal = unusual.refusal
    return json_tensors(load_json(raw, refusal), dtypes)


def load_json(body: Buffer, refusal: RequestError | None = None) -> Any:
    """Parse a body with orjson, which holds the GIL all the time and makes an object of each value.

    Args:
        body: the text.
        refusal: raised for a body of too many values; by default an `InvalidRequest`.

    Raises:
        MalformedBody: not JSON.
        InvalidRequest: a number that does not fit float64, or more than 262,144 values.
    """
    raw = byte_view(body)
    if len(raw) > _MOST_VALUES and not _has_few_values(raw):
        raise refusal or InvalidRequest(
            f"body: more than {_MOST_VALUES} values that are not all numbers in nested lists of one length, each under"
            " the name of a known tensor; which of them is wrong is told of fewer",
            field="body",
            expected="regular nested lists of numbers",
        )
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if "infinity" in error.msg:
            raise InvalidRequest(f"a number does not fit float64: {error}", expected="float64") from None
        raise MalformedBody(f"not JSON: {error}") from None


def _has_few_values(raw: memoryview) -> bool:
    """Whether there are at most `_MOST_VALUES`. Every value but the outermost follows a bracket, a brace or a comma."""
    count = 0
    for start in range(0, len(raw), PIECE_BYTES):
        piece = bytes(raw[start : start + PIECE_BYTES])
        count += sum(map(piece.count, (b"[", b"{", b",")))
        if count > _MOST_VALUES:
            return False
    return True


def json_tensors(document: Any, dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """The same of an object that orjson has read. Raises as `decode_json`."""
    return {name: Tensor.of(array) for name, array in _read_document(document, dtypes).items()}


def split_vectors(body: Buffer, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """An object's vectors of these names in float64, and its other members; None where anything is unusual.

    If it is None, use `load_json`, which decides whether the body is refused.
    """
    others: dict[str, Any] = {}
    vectors: dict[str, Tensor] = {}
    try:
        for name, text in members(byte_view(body), MOST_MEMBERS):
            if name in others or name in vectors:
                return None
            if name in names:
                vectors[name] = Tensor.of(read_lists(text, "float64"))
            elif len(text) <= LONGEST_NUMBER:
                others[name] = orjson.loads(text)
            else:
                return None
    except (UnusualError, orjson.JSONDecodeError):
        return None
    return (others, vectors) if all(len(vector.shape) == 1 for vector in vectors.values()) else None


def encode_json(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> list[Buffer]:
    """One object: the tensors as nested lists, then the fields."""
    return json_pieces({**tensors, **fields})


def _read_document(document: Any, dtypes: Mapping[str, str]) -> dict[str, Array]:
    if not isinstance(document, dict):
        raise MalformedBody("the body must be a JSON object", expected="an object", got=_told(document))
    check_known(document, dtypes)
    return {name: _values(name, nested, dtypes[name]) for name, nested in document.items()}


def _values(name: str, nested: Any, dtype: str) -> Array:
    """Nested lists, flattened level by level, and then in their shape."""
    level = [nested]
    shape: list[int] = []
    while (kinds := set(map(type, level))) == {list}:
        lengths = set(map(len, level))
        if len(lengths) > 1:
            raise ShapeMismatch(
                f"{name}: ragged, there are lists of different lengths at depth {len(shape)}",
                field=name,
                expected="lists of one length",
                got=sorted(lengths)[:8],
            )
        shape += lengths
        if len(shape) > MAX_RANK:
            raise ShapeMismatch(f"{name}: more than {MAX_RANK} dimensions", field=name, expected=MAX_RANK)
        level = list(chain.from_iterable(level))
    if list in kinds:
        raise ShapeMismatch(f"{name}: ragged, lists and numbers are mixed at depth {len(shape)}", field=name)
    if dtype == "int64":
        return _integers(name, level).reshape(shape)
    wide = _floats(name, level, kinds)
    try:
        return rounded(wide, dtype).reshape(shape)
    except UnusualError:
        raise _overflow(name, wide) from None


def _floats(name: str, level: list[Any], kinds: set[type]) -> Array:
    if not kinds <= {int, float}:
        level = [_float(name, value) for value in level]
    return np.array(level, np.float64)


def _float(name: str, value: Any) -> float:
    if isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    expected = 'numbers, "NaN", "Infinity" or "-Infinity"'
    raise InvalidRequest(f"{name}: {_told(value)} is not a number", field=name, expected=expected, got=_told(value))


def _integers(name: str, level: list[Any]) -> Array:
    for value in level:
        if type(value) is not int or not -(2**63) <= value < 2**63:
            raise InvalidRequest(
                f"{name}: {_told(value)} is not an integer that fits int64",
                field=name,
                expected="integers that fit int64",
                got=_told(value),
            )
    return np.array(level, np.int64)


def _overflow(name: str, wide: Array) -> InvalidRequest:
    """Names the first number that does not fit float32."""
    with np.errstate(over="ignore"):
        lost = np.isfinite(wide) & ~np.isfinite(wide.astype(np.float32))
    got = float(wide[lost][0])
    return InvalidRequest(f"{name}: {got!r} does not fit float32", field=name, expected="float32", got=got)


def _told(value: Any) -> str:
    """A JSON value in a few words, for a problem's detail."""
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, bool) or value is None:
        return {"True": "true", "False": "false", "None": "null"}[str(value)]
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
