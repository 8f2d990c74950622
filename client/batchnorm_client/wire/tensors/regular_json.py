"""The fast reader of JSON tensors: regular nested lists only, parsed piece by piece.

Their brackets and commas must be those of one shape; simdjson, if it is installed, parses the numbers between them.
Whatever it does not accept goes to the reader in `json`, which alone decides what is refused and why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from types import ModuleType
from typing import Final

import numpy as np
import orjson

from batchnorm_client.wire.errors import InvalidRequest, RequestError, ShapeMismatch
from batchnorm_client.wire.tensors.tensor import MAX_RANK, Array, check_known

simdjson: ModuleType | None
try:
    import simdjson
except ImportError:  # not installed with the client alone
    simdjson = None

NON_FINITE: Final = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}
"""The strings that stand for numbers that JSON does not have."""

MOST_MEMBERS: Final = 64
LONGEST_NUMBER: Final = 4096  # bytes, blanks included; no number of a regular body is longer
PIECE_BYTES: Final = 1 << 17  # that are parsed with one call

_LONGEST_INTEGER: Final = 64
_TIE: Final = 7.038531e-26
_FIRST_KEY: Final = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"(\w+)"[ \t\r\n]*')
_NEXT_KEY: Final = re.compile(rb',[ \t\r\n]*"(\w+)"[ \t\r\n]*\Z')
_LONGEST_KEY: Final = 256  # bytes, blanks included
_END: Final = re.compile(rb"\}[ \t\r\n]*\Z")
_NUMBERS: Final = b"0123456789+-.eE \t\r\n"


class UnusualError(Exception):
    """The fast reader does not accept a body.

    Args:
        refusal: the error to raise if the body is too large for the other reader.
    """

    def __init__(self, refusal: RequestError | None = None) -> None:
        super().__init__()
        self.refusal = refusal


class _RaggedError(UnusualError):
    """Nested lists that are ragged, or have too many dimensions."""


def read_regular(raw: memoryview, dtypes: Mapping[str, str]) -> dict[str, Array]:
    """The fast reader. Raises `UnusualError`."""
    found: dict[str, Array] = {}
    for name, text in members(raw, MOST_MEMBERS):
        try:
            check_known({name: text}, dtypes)
        except InvalidRequest as refusal:
            raise UnusualError(refusal) from None
        if name in found:
            raise UnusualError
        try:
            found[name] = _read_integer(text) if dtypes[name] == "int64" else read_lists(text, dtypes[name])
        except _RaggedError:
            raise UnusualError(ShapeMismatch(f"{name}: ragged", field=name, expected="lists of one length")) from None
    return found


def members(raw: memoryview, most: int) -> Iterator[tuple[str, memoryview]]:
    """The members of the body's object, each with the text of its value, which is not looked into.

    No value that is taken has a colon, so that each colon in the body ends a key.
    """
    colons = _colons(raw, most)
    end = _END.search(raw, max(len(raw) - _LONGEST_KEY, 0))
    key = _FIRST_KEY.fullmatch(raw, 0, colons[0]) if colons[0] <= _LONGEST_KEY else None
    if key is None or end is None:
        raise UnusualError
    for colon, following in zip(colons, [*colons[1:], None], strict=True):
        name = key[1].decode()
        if following is None:
            yield name, raw[colon + 1 : end.start()]
            return
        key = _NEXT_KEY.search(raw, max(colon + 1, following - _LONGEST_KEY), following)
        if key is None:
            raise UnusualError
        yield name, raw[colon + 1 : key.start()]


def _colons(raw: memoryview, most: int) -> list[int]:
    """Where the body has colons: at least one, and no more than these."""
    colons: list[int] = []
    for start in range(0, len(raw), PIECE_BYTES):
        piece, at = bytes(raw[start : start + PIECE_BYTES]), -1
        while (at := piece.find(b":", at + 1)) >= 0:
            colons.append(start + at)
            if len(colons) > most:
                raise UnusualError
    if not colons:
        raise UnusualError
    return colons


def _read_integer(text: memoryview) -> Array:
    try:
        value = orjson.loads(text) if len(text) <= _LONGEST_INTEGER else None
    except orjson.JSONDecodeError:
        raise UnusualError from None
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise UnusualError
    return np.array(value, np.int64)


def read_lists(text: memoryview, dtype: str) -> Array:
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
        end = at + PIECE_BYTES
        comma = bytes(text[end : end + LONGEST_NUMBER]).find(b",")
        if comma < 0 and end + LONGEST_NUMBER < len(text):
            raise UnusualError
        end = len(text) if comma < 0 else end + comma
        piece, lost = bytes(text[at:end]), None
        if b'"' in piece:
            piece, lost = _without_names(piece)
        structure.append(marks := piece.translate(None, _NUMBERS))
        begun, ended = marks.count(b"["), marks.count(b"]")
        opened, depth = depth, depth + begun - ended
        if depth < 1:  # the next piece would be parsed on its own, and may not be a list
            raise UnusualError
        flat = _parse_numbers(b"[" * opened + piece + b"]" * depth)
        # Where the marks are not all brackets and commas, no shape fits.
        if flat.size not in {0, len(marks) - begun - ended + 1}:
            raise UnusualError
        if bool(flat.size) != bool(numbers[0].size if numbers else flat.size):
            raise _RaggedError
        if lost is not None:
            flat = flat.copy()
            flat[lost[0]] = lost[1]
        numbers.append(rounded(flat, dtype))
        at = end + 1
    shape = _shape_of(b",".join(structure), empty=not numbers[0].size)
    return (numbers[0] if len(numbers) == 1 else np.concatenate(numbers)).reshape(shape)


def _without_names(piece: bytes) -> tuple[bytes, tuple[Array, Array]]:
    """A piece with 0 for each "NaN", "Infinity" and "-Infinity"; which of its elements they were, and their values."""
    numbers = piece
    for name in NON_FINITE:
        numbers = numbers.replace(b'"%b"' % name.encode(), b" 0 ")
    if b'"' in numbers:
        raise UnusualError
    raw = np.frombuffer(piece, np.uint8)
    quotes = np.flatnonzero(raw == ord('"'))
    first, last = quotes[::2], quotes[1::2]
    values = np.select([last - first == len(name) + 1 for name in NON_FINITE], list(NON_FINITE.values()))
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
        raise UnusualError from None
    if not set(map(type, level)) <= {int, float}:
        raise UnusualError
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


def rounded(flat: Array, dtype: str) -> Array:
    """float64 in its dtype. Raises `UnusualError` where a number does not fit."""
    if dtype != "float32":
        return flat
    try:
        with np.errstate(over="raise"):
            narrow = flat.astype(np.float32)
    except FloatingPointError:
        raise UnusualError from None
    # float32 through float64 rounds twice. Of all shortest texts of a float32 this is the only one that comes
    # back as another: as a float64 it lies exactly between two of them, and the tie goes the wrong way.
    ties = np.abs(flat) == _TIE
    if np.count_nonzero(ties):  # quicker than any()
        narrow[ties] = np.nextafter(narrow[ties], np.float32(0))
    return narrow
