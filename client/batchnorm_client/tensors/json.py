"""Tensors in JSON: nested lists of numbers; what is not finite travels as "NaN", "Infinity" and "-Infinity".

Reading has two ways. simdjson, where it is installed, flattens a big body without making a Python object of each
number, but knows nothing of shapes; it takes only what is regular through and through. Whatever it does not take goes
the second way, through orjson, which accepts the same bodies and alone decides what is refused and why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from batchnorm_client.errors import InvalidRequest, MalformedBody, ShapeMismatch
from batchnorm_client.tensors.brackets import empty_lists, rewrapped
from batchnorm_client.tensors.tensor import MAX_RANK, Array, Buffer, Tensor, byte_view, check_known

simdjson: ModuleType | None
try:
    import simdjson
except ImportError:  # the light client does without
    simdjson = None

_NON_FINITE: Final = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}
_SIMDJSON_FROM: Final = 1024  # bytes; below, orjson is as fast
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"  # simdjson skips it; orjson and RFC 8259 do not take it
_TIE: Final = 7.038531e-26


class _Values(NamedTuple):
    """A tensor's elements in C order, float64 or int64, and the shape that they had."""

    flat: Array
    shape: tuple[int, ...]


def decode_json(body: Buffer, dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a JSON object, each in the dtype that `dtypes` names: float32, float64 or int64.

    Numbers are read as float64, then rounded; integers of any size are numbers. Of a key that occurs twice the last
    counts, as is usual among JSON readers.

    Raises:
        MalformedBody: not JSON, or not an object.
        InvalidRequest: a tensor that is not known, an element that is not a number, a number that does not fit.
        ShapeMismatch: ragged lists, or more than 64 dimensions.
    """
    raw = byte_view(body)
    found = _read_regular(raw, dtypes) if len(raw) >= _SIMDJSON_FROM else None
    if found is None:
        found = _read_any(raw, dtypes)
    return {name: Tensor.of(_rounded(name, values, dtypes[name])) for name, values in found.items()}


def encode_json(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> list[Buffer]:
    """One object: the tensors as nested lists, then the fields."""
    document = {name: _json_value(tensor) for name, tensor in tensors.items()} | dict(fields)
    return [orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)]


def _json_value(tensor: Tensor) -> Any:
    """As `json_list`; or its text, where a shape has more lists than the tensor has bytes to pay for them."""
    dtype, shape, buffer = tensor
    if not tensor.nbytes:
        return empty_lists(shape)
    if 1 not in shape[1:]:
        return json_list(tensor)
    squeezed = Tensor(dtype, tuple(n for n in shape if n != 1), buffer)
    text = orjson.dumps(json_list(squeezed), option=orjson.OPT_SERIALIZE_NUMPY)
    return orjson.Fragment(rewrapped(text, shape))


def json_list(tensor: Tensor) -> Any:
    """What `orjson.dumps(..., option=OPT_SERIALIZE_NUMPY)` writes as nested lists that read back exactly.

    Returns:
        An array where all elements are finite, nested lists of numbers and strings otherwise, a scalar or a string
        for a tensor without dimensions. float16 and bfloat16 are widened to float32, which loses nothing.
    """
    array = _widened(tensor)
    finite = np.isfinite(array)
    if finite.all():
        return array if array.shape else array[()]
    nested: list[Any] = list(array.reshape(-1))
    for place in np.flatnonzero(~finite):
        nested[place] = "NaN" if np.isnan(nested[place]) else "Infinity" if nested[place] > 0 else "-Infinity"
    for n in reversed(array.shape):
        nested = [nested[i : i + n] for i in range(0, len(nested), n)]
    return nested[0]


def _widened(tensor: Tensor) -> Array:
    if tensor.dtype == "bfloat16":  # the upper half of a float32
        halves = np.ndarray(tensor.shape, "<u2", buffer=tensor.buffer)
        wide: Array = np.left_shift(halves, 16, dtype=np.uint32)
        return wide.view(np.float32)
    array = tensor.numpy()
    return array.astype(np.float32) if tensor.dtype == "float16" else array


def _read_regular(raw: memoryview, dtypes: Mapping[str, str]) -> dict[str, _Values] | None:
    """The way for big bodies: None where anything is unusual."""
    if simdjson is None or bytes(raw[:3]) == _BYTE_ORDER_MARK:
        return None
    found: dict[str, _Values] = {}
    lists = 0
    try:
        # A new parser each time: it may not be used again while an array of its last document lives, and keeps as
        # much memory as its largest document took.
        document = simdjson.Parser().parse(raw)
        for name in document.keys():  # noqa: SIM118 (the root may be a list, which has no keys)
            if name in found or dtypes.get(name) not in ("float32", "float64"):
                return None
            shape, count = _list_shape(document[name])
            flat = np.frombuffer(document[name].as_buffer(of_type="d"))
            if flat.size != math.prod(shape):  # simdjson counts no further than 2**24 in a list
                return None
            found[name] = _Values(flat, shape)
            lists += count
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    # What `_list_shape` did not look into are the innermost lists. They have no lists in them if the body has no more
    # brackets than there are lists above; strings were refused, and a bracket in a name only leads to the other way.
    brackets = np.count_nonzero(np.frombuffer(raw, np.uint8) == ord("["))
    return found if brackets == lists else None


def _list_shape(array: Any) -> tuple[tuple[int, ...], int]:
    """The shape of nested lists that are regular down to the innermost, and how many lists they are.

    Raises:
        ValueError: they are not.
    """
    level, lists = [array], 0
    shape: list[int] = []
    kind = type(array)
    while True:
        lengths = set(map(len, level))
        if len(lengths) != 1 or len(shape) == MAX_RANK:
            raise ValueError
        lists += len(level)
        shape += lengths
        if not shape[-1] or type(level[0][0]) is not kind:
            return tuple(shape), lists
        level = list(chain.from_iterable(level))
        if set(map(type, level)) != {kind}:
            raise ValueError


def _read_any(raw: memoryview, dtypes: Mapping[str, str]) -> dict[str, _Values]:
    """The way for every body, with the refusals."""
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if "infinity" in error.msg:
            raise InvalidRequest(f"a number does not fit float64: {error}", expected="float64") from None
        raise MalformedBody(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise MalformedBody("the body must be a JSON object", expected="an object", got=_told(document))
    check_known(document, dtypes)
    return {name: _values(name, nested, dtypes[name]) for name, nested in document.items()}


def _values(name: str, nested: Any, dtype: str) -> _Values:
    """Nested lists, flattened level by level."""
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
    return _Values(_integers(name, level) if dtype == "int64" else _floats(name, level, kinds), tuple(shape))


def _floats(name: str, level: list[Any], kinds: set[type]) -> Array:
    if not kinds <= {int, float}:
        level = [_float(name, value) for value in level]
    return np.array(level, np.float64)


def _float(name: str, value: Any) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
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


def _rounded(name: str, values: _Values, dtype: str) -> Array:
    """The elements in their dtype and shape."""
    flat = values.flat
    if dtype == "float32":
        with np.errstate(over="ignore"):
            flat = values.flat.astype(np.float32)
        _check_overflow(name, values.flat, flat)
        # float32 through float64 rounds twice. Of all shortest texts of a float32 this is the only one that comes
        # back as another: as a float64 it lies exactly between two of them, and the tie goes the wrong way.
        ties = np.abs(values.flat) == _TIE
        if ties.any():
            flat[ties] = np.nextafter(flat[ties], np.float32(0))
    return flat.reshape(values.shape)


def _check_overflow(name: str, wide: Array, narrow: Array) -> None:
    finite = np.isfinite(narrow)
    if finite.all():
        return
    lost = np.flatnonzero(~finite & np.isfinite(wide))
    if lost.size:
        got = float(wide[lost[0]])
        raise InvalidRequest(f"{name}: {got!r} does not fit float32", field=name, expected="float32", got=got)


def _told(value: Any) -> str:
    """A JSON value in a few words, for a problem's detail."""
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, bool) or value is None:
        return {"True": "true", "False": "false", "None": "null"}[str(value)]
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
