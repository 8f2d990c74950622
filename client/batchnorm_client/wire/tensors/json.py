"""Tensors in JSON: nested lists of numbers; non-finite ones are the strings "NaN", "Infinity" and "-Infinity".

Parsers and writers of JSON hold the GIL from their first byte to their last. Large texts are therefore
read and written in pieces, so that other threads, such as the event loop's, need not wait for a whole body.

There are two readers. The fast one, for large bodies, accepts only regular nested lists: their brackets and
commas must be those of one shape, and the numbers between them are parsed piece by piece, by simdjson if it is
installed. Other bodies go to the second one, orjson in one call, which accepts the same bodies and alone decides
what is refused and why.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from types import ModuleType
from typing import Any, Final

import numpy as np
import orjson

from batchnorm_client.wire.errors import InvalidRequest, MalformedBody, RequestError, ShapeMismatch
from batchnorm_client.wire.tensors.brackets import empty_lists, rewrapped
from batchnorm_client.wire.tensors.tensor import MAX_RANK, NUMPY_DTYPES, Array, Buffer, Tensor, byte_view, check_known

simdjson: ModuleType | None
try:
    import simdjson
except ImportError:  # not installed with the client alone
    simdjson = None

JSON_DTYPES: Final = frozenset({"bfloat16", *NUMPY_DTYPES} - {"complex64"})
"""The dtypes that can be written; float16 and bfloat16 are widened to float32, which is exact."""

_NON_FINITE: Final = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}
_OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z
_TIE: Final = 7.038531e-26

_FAST_FROM: Final = 1024  # bytes; below, one call of orjson is as fast
_PIECE_BYTES: Final = 1 << 17  # that are read with one call
_PIECE_ELEMENTS: Final = 1 << 15  # that are written with one call
_LONGEST_NUMBER: Final = 4096  # bytes, blanks included; no number of a regular body is longer
_LONGEST_INTEGER: Final = 64
_MOST_MEMBERS: Final = 64
_MOST_VALUES: Final = 1 << 18  # lists, objects and others, that orjson reads with one call: some 30 ms and 30 MB

_FIRST_KEY: Final = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"(\w+)"[ \t\r\n]*')
_NEXT_KEY: Final = re.compile(rb',[ \t\r\n]*"(\w+)"[ \t\r\n]*\Z')
_LONGEST_KEY: Final = 256  # bytes, blanks included
_END: Final = re.compile(rb"\}[ \t\r\n]*\Z")
_NUMBERS: Final = b"0123456789+-.eE \t\r\n"


class _UnusualError(Exception):
    """The fast reader does not accept a body.

    Args:
        refusal: the error to raise if the body is too large for the other reader.
    """

    def __init__(self, refusal: RequestError | None = None) -> None:
        super().__init__()
        self.refusal = refusal


class _RaggedError(_UnusualError):
    """Nested lists that are ragged, or have too many dimensions."""


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
            return {name: Tensor.of(array) for name, array in _read_regular(raw, dtypes).items()}
        except _UnusualError as unusual:
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
    for start in range(0, len(raw), _PIECE_BYTES):
        piece = bytes(raw[start : start + _PIECE_BYTES])
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
        for name, text in _members(byte_view(body), _MOST_MEMBERS):
            if name in others or name in vectors:
                return None
            if name in names:
                vectors[name] = Tensor.of(_read_lists(text, "float64"))
            elif len(text) <= _LONGEST_NUMBER:
                others[name] = orjson.loads(text)
            else:
                return None
    except (_UnusualError, orjson.JSONDecodeError):
        return None
    return (others, vectors) if all(len(vector.shape) == 1 for vector in vectors.values()) else None


def encode_json(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> list[Buffer]:
    """One object: the tensors as nested lists, then the fields."""
    return json_pieces({**tensors, **fields})


def json_pieces(document: Mapping[str, Any]) -> list[Buffer]:
    """The text of an object, in pieces; those of its values that are tensors are written as nested lists.

    The numbers read back exactly. float16 and bfloat16 are widened to float32.
    """
    listed = {name: _listed(value) for name, value in document.items() if isinstance(value, Tensor)}
    values = {**document, **listed}
    arrays = {name: value for name, value in listed.items() if isinstance(value, np.ndarray)}
    if sum([array.size for array in arrays.values()]) <= _PIECE_ELEMENTS:
        values |= {name: _writable(array) for name, array in arrays.items()}
        return [orjson.dumps(values, option=_OPTIONS)]
    pieces: list[Buffer] = []
    for name, value in values.items():
        pieces.append((b"," if pieces else b"{") + orjson.dumps(name) + b":")
        if name in arrays:
            pieces += _list_pieces(arrays[name])
        else:
            pieces.append(orjson.dumps(value, option=_OPTIONS))
    pieces.append(b"}")
    return pieces


def _listed(tensor: Tensor) -> Array | orjson.Fragment:
    """A tensor as an array; as text where a shape has more lists than the tensor has bytes to pay for them."""
    shape = tensor.shape
    if not tensor.nbytes:
        return empty_lists(shape)
    array = widened(tensor)
    if 1 not in shape[1:]:
        return array
    squeezed = array.reshape([n for n in shape if n != 1])
    return orjson.Fragment(rewrapped(b"".join(_list_pieces(squeezed)), shape))


def _list_pieces(array: Array) -> Iterator[bytes]:
    """An array as nested lists, in pieces that are each written with one call."""
    if array.size <= _PIECE_ELEMENTS:
        yield _list_text(array)
        return
    rows = max(1, _PIECE_ELEMENTS * len(array) // array.size)
    for start in range(0, len(array), rows):
        yield b"," if start else b"["
        if array[0].size > _PIECE_ELEMENTS:
            yield from _list_pieces(array[start])
        else:
            yield _list_text(array[start : start + rows])[1:-1]
    yield b"]"


def _writable(array: Array) -> Any:
    """What orjson writes as nested lists."""
    if np.count_nonzero(np.isfinite(array)) < array.size:
        return orjson.Fragment(_list_text(array))
    return array if array.shape else array[()]


def _list_text(array: Array) -> bytes:
    """An array as nested lists; orjson writes null where an element is not finite."""
    text = orjson.dumps(array if array.shape else array[()], option=_OPTIONS)
    finite = np.isfinite(array)
    if finite.all():
        return text
    kinds = np.select([np.isnan(array), array > 0], [0, 1], 2)[~finite]
    names = [b'"%b"' % name.encode() for name in _NON_FINITE]
    between = text.split(b"null")
    parts = [b""] * (2 * len(between) - 1)
    parts[::2] = between
    parts[1::2] = [names[kind] for kind in kinds.tolist()]
    return b"".join(parts)


def widened(tensor: Tensor) -> Array:
    """An array of a tensor's numbers, exactly; float16 and bfloat16 become float32."""
    if tensor.dtype == "bfloat16":  # the upper half of a float32
        halves = np.ndarray(tensor.shape, "<u2", buffer=tensor.buffer)
        wide: Array = np.left_shift(halves, 16, dtype=np.uint32)
        return wide.view(np.float32)
    array = tensor.numpy()
    return array.astype(np.float32) if tensor.dtype == "float16" else array


def _read_regular(raw: memoryview, dtypes: Mapping[str, str]) -> dict[str, Array]:
    """The fast reader. Raises `_UnusualError`."""
    found: dict[str, Array] = {}
    for name, text in _members(raw, _MOST_MEMBERS):
        try:
            check_known({name: text}, dtypes)
        except InvalidRequest as refusal:
            raise _UnusualError(refusal) from None
        if name in found:
            raise _UnusualError
        try:
            found[name] = _read_integer(text) if dtypes[name] == "int64" else _read_lists(text, dtypes[name])
        except _RaggedError:
            raise _UnusualError(ShapeMismatch(f"{name}: ragged", field=name, expected="lists of one length")) from None
    return found


def _members(raw: memoryview, most: int) -> Iterator[tuple[str, memoryview]]:
    """The members of the body's object, each with the text of its value, which is not looked into.

    No value that is taken has a colon, so that each colon in the body ends a key.
    """
    colons = _colons(raw, most)
    end = _END.search(raw, max(len(raw) - _LONGEST_KEY, 0))
    key = _FIRST_KEY.fullmatch(raw, 0, colons[0]) if colons[0] <= _LONGEST_KEY else None
    if key is None or end is None:
        raise _UnusualError
    for colon, following in zip(colons, [*colons[1:], None], strict=True):
        name = key[1].decode()
        if following is None:
            yield name, raw[colon + 1 : end.start()]
            return
        key = _NEXT_KEY.search(raw, max(colon + 1, following - _LONGEST_KEY), following)
        if key is None:
            raise _UnusualError
        yield name, raw[colon + 1 : key.start()]


def _colons(raw: memoryview, most: int) -> list[int]:
    """Where the body has colons: at least one, and no more than these."""
    colons: list[int] = []
    for start in range(0, len(raw), _PIECE_BYTES):
        piece, at = bytes(raw[start : start + _PIECE_BYTES]), -1
        while (at := piece.find(b":", at + 1)) >= 0:
            colons.append(start + at)
            if len(colons) > most:
                raise _UnusualError
    if not colons:
        raise _UnusualError
    return colons


def _read_integer(text: memoryview) -> Array:
    try:
        value = orjson.loads(text) if len(text) <= _LONGEST_INTEGER else None
    except orjson.JSONDecodeError:
        raise _UnusualError from None
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise _UnusualError
    return np.array(value, np.int64)


def _read_lists(text: memoryview, dtype: str) -> Array:
    """Nested lists that are regular.

    Each piece ends before a comma. With the brackets that are open at its ends put before and behind it, it is an
    array of its own, and a parser sees to its grammar. That the pieces fit together follows from two things: no number
    is missing, because there is one more in a piece than it has commas, and the brackets and commas of all pieces
    together are those of one shape.
    """
    structure: list[bytes] = []
    numbers: list[Array] = []
    at, depth = 0, 1
    while at <= len(text):
        end = at + _PIECE_BYTES
        comma = bytes(text[end : end + _LONGEST_NUMBER]).find(b",")
        if comma < 0 and end + _LONGEST_NUMBER < len(text):
            raise _UnusualError
        end = len(text) if comma < 0 else end + comma
        piece, lost = bytes(text[at:end]), None
        if b'"' in piece:
            piece, lost = _without_names(piece)
        structure.append(marks := piece.translate(None, _NUMBERS))
        begun, ended = marks.count(b"["), marks.count(b"]")
        opened, depth = depth, depth + begun - ended
        flat = _parse_numbers(b"[" * opened + piece + b"]" * depth)
        # Where the marks are not all brackets and commas, no shape fits.
        if flat.size not in {0, len(marks) - begun - ended + 1}:
            raise _UnusualError
        if bool(flat.size) != bool(numbers[0].size if numbers else flat.size):
            raise _RaggedError
        if lost is not None:
            flat = flat.copy()
            flat[lost[0]] = lost[1]
        numbers.append(_rounded(flat, dtype))
        at = end + 1
    shape = _shape_of(b",".join(structure), empty=not numbers[0].size)
    return (numbers[0] if len(numbers) == 1 else np.concatenate(numbers)).reshape(shape)


def _without_names(piece: bytes) -> tuple[bytes, tuple[Array, Array]]:
    """A piece with 0 for each "NaN", "Infinity" and "-Infinity"; which of its elements they were, and their values."""
    numbers = piece
    for name in _NON_FINITE:
        numbers = numbers.replace(b'"%b"' % name.encode(), b" 0 ")
    if b'"' in numbers:
        raise _UnusualError
    raw = np.frombuffer(piece, np.uint8)
    quotes = np.flatnonzero(raw == ord('"'))
    first, last = quotes[::2], quotes[1::2]
    values = np.select([last - first == len(name) + 1 for name in _NON_FINITE], list(_NON_FINITE.values()))
    return numbers, (np.searchsorted(np.flatnonzero(raw == ord(",")), first), values)


def _parse_numbers(text: bytes) -> Array:
    """The numbers of nested lists, as float64."""
    try:
        if simdjson is not None:
            # A new parser each time: one that is kept would keep as much memory as its largest text took.
            return np.frombuffer(simdjson.Parser().parse(text).as_buffer(of_type="d"))
        level = orjson.loads(text)
        while level and isinstance(level[0], list):
            level = list(chain.from_iterable(level))
    except (RuntimeError, TypeError, ValueError):
        raise _UnusualError from None
    if not set(map(type, level)) <= {int, float}:
        raise _UnusualError
    return np.array(level, np.float64)


def _shape_of(structure: bytes, *, empty: bool) -> tuple[int, ...]:
    """The shape of regular nested lists, from their brackets and commas alone; `empty`: they have no elements."""
    rank = len(structure) - len(structure.lstrip(b"["))
    shape = [0] if empty else []
    inner = b"[]" if empty else b""  # of one list of the level below
    for level in range(rank - len(shape), 0, -1):
        # The first list of this level ends where for the first time so many lists end at once.
        end = structure.find(b"]" * (len(shape) + 1), level) + len(shape)
        length, rest = divmod(end - level + 1, len(inner) + 1)
        if rest or length < 1:
            raise _RaggedError
        shape.append(length)
        inner = b"[" + (inner + b",") * (length - 1) + inner + b"]"
    if rank > MAX_RANK or inner != structure:
        raise _RaggedError
    return tuple(reversed(shape))


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
        return _rounded(wide, dtype).reshape(shape)
    except _UnusualError:
        raise _overflow(name, wide) from None


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


def _rounded(flat: Array, dtype: str) -> Array:
    """float64 in its dtype. Raises `_UnusualError` where a number does not fit."""
    if dtype != "float32":
        return flat
    try:
        with np.errstate(over="raise"):
            narrow = flat.astype(np.float32)
    except FloatingPointError:
        raise _UnusualError from None
    # float32 through float64 rounds twice. Of all shortest texts of a float32 this is the only one that comes
    # back as another: as a float64 it lies exactly between two of them, and the tie goes the wrong way.
    ties = np.abs(flat) == _TIE
    if np.count_nonzero(ties):  # quicker than any()
        narrow[ties] = np.nextafter(narrow[ties], np.float32(0))
    return narrow


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
