"""The safetensors file: several tensors by name, and strings about them.

    8 bytes: the header's length, little-endian | the header, JSON | the tensors' bytes, without holes

Our own reader, because the official one copies every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

import orjson

from batchnorm_client.wire.errors import DtypeMismatch, MalformedBody
from batchnorm_client.wire.tensors.tensor import (
    MAX_BYTES,
    Buffer,
    Tensor,
    byte_view,
    check_known,
    checked_shape,
    itemsize,
    view_tensor,
)

_METADATA: Final = "__metadata__"
_MAX_HEADER: Final = 1 << 20  # a layer has fewer than ten tensors
MANY_LAYERS_HEADER: Final = 1 << 24
"""The largest header of a file with the states of many layers: 120 bytes for each tensor of 10,000 layers, and their
configs."""

_MAX_CACHED: Final = 512  # what calls send; the headers of records are longer, and each is another
_MAX_REPEATED: Final = 1 << 16
_ENTRY: Final = {"dtype", "shape", "data_offsets"}
_NAMES: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
_CODES: Final = {name: code for code, name in _NAMES.items()}
SAFETENSORS_DTYPES: Final = frozenset(_CODES)
"""The dtypes that the form has: all that can be sent."""

_SMALLER_THAN_A_BYTE: Final = {"F4", "F6_E2M3", "F6_E3M2"}


class _Entry(NamedTuple):
    """Where a tensor lies, counted from where the data start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Layout(NamedTuple):
    """A header that was checked."""

    entries: tuple[_Entry, ...]
    metadata: dict[str, str]
    size: int


def decode_safetensors(
    body: Buffer, *, max_header: int = _MAX_HEADER, repeated: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, as views of the body in the header's order, and its metadata.

    Of a name that the header has twice, the last counts.

    Args:
        body: the file.
        max_header: a header of more bytes is refused.
        repeated: whether a long header is kept, too, because it comes again and again: that of a model at each step.

    Raises:
        MalformedBody: the header lies, or is not one; the tensors do not cover the data exactly.
        DtypeMismatch: a dtype of less than a byte.
    """
    tensors, layout = _view(body, max_header, repeated=repeated)
    return tensors, dict(layout.metadata)


def _view(body: Buffer, max_header: int = _MAX_HEADER, *, repeated: bool = False) -> tuple[dict[str, Tensor], _Layout]:
    """A file's tensors, and its header."""
    view = byte_view(body)
    text, start = _split(view, max_header)
    read = _layout
    if len(text) < _MAX_CACHED:
        read = _cached_layout
    elif repeated and len(text) < _MAX_REPEATED:
        read = _cached_long_layout
    layout = read(text)
    if len(view) != start + layout.size:
        raise MalformedBody(
            f"the safetensors header describes a file of {start + layout.size} bytes; the body has {len(view)}",
            expected=start + layout.size,
            got=len(view),
        )
    tensors = {
        entry.name: view_tensor(entry.dtype, entry.shape, view[start + entry.begin : start + entry.end])
        for entry in layout.entries
    }
    return tensors, layout


def safetensors_data_start(body: Buffer) -> int:
    """Where the tensors' bytes begin, on the word of the first eight bytes."""
    return 8 + int.from_bytes(body[:8], "little")


def decode_safetensors_header(head: Buffer) -> tuple[dict[str, Any], int]:
    """A file's header, and where its data start, from the file's first bytes alone.

    Args:
        head: as many of the file's first bytes as hold its header, or more.

    Returns:
        The header's JSON object, checked: `name -> {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}`
        and, where the file has it, `"__metadata__" -> {string: string}`. Offsets count from where the data start.

    Raises:
        MalformedBody: not a safetensors header, or not the whole of it.
        DtypeMismatch: a dtype of less than a byte.
    """
    text, start = _split(byte_view(head))
    _layout(text)
    header: dict[str, Any] = orjson.loads(text)
    return header, start


def encode_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[Buffer]:
    """A file in pieces: its header, then the tensors' own buffers in the given order.

    The data start at a multiple of 8. For a reader that wants to view them, every tensor must begin at a multiple of
    its itemsize: give tensors of wider dtypes first.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata is not None else {}
    pieces: list[Buffer] = []
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
        if end > begin:
            pieces.append(tensor.buffer)
    return [_head(header), *pieces]


def decode_named(body: Buffer, dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """The codec table's entry: `decode_safetensors` with the names checked; metadata are not looked at."""
    tensors, _ = _view(body)
    check_known(tensors, dtypes)
    return tensors


def encode_named(tensors: Mapping[str, Tensor], _fields: Mapping[str, Any]) -> list[Buffer]:
    """The codec table's entry: `encode_safetensors` with wider dtypes first; fields have no place here."""
    if len(tensors) == 1:
        ((name, tensor),) = tensors.items()
        head = _written_head(name, tensor.dtype, tensor.shape)
        return [head, tensor.buffer] if tensor.nbytes else [head]
    wide_first = sorted(tensors.items(), key=lambda item: -itemsize(item[1].dtype))
    return encode_safetensors(dict(wide_first))


@lru_cache(maxsize=256)
def _written_head(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """What comes before the data of a file with one tensor: the same again and again."""
    size = math.prod(shape) * itemsize(dtype)
    return _head({name: {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (0, size)}})


def _head(header: Mapping[str, Any]) -> bytes:
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _split(view: memoryview, max_header: int = _MAX_HEADER) -> tuple[bytes, int]:
    """The header's text, and where the data start."""
    length = int.from_bytes(view[:8], "little")
    start = 8 + length
    if len(view) < 8 or start > len(view):
        raise MalformedBody("the safetensors header is cut off, or its length lies")
    if length > max_header:
        raise MalformedBody("the safetensors header is too large", expected=max_header, got=length)
    return bytes(view[8:start]), start


def _layout(text: bytes) -> _Layout:
    """A header's tensors and metadata, once every entry is checked and they cover the data from 0 on."""
    try:
        header = orjson.loads(text) if text.startswith(b"{") else None
    except orjson.JSONDecodeError:
        header = None
    if not isinstance(header, dict):
        raise MalformedBody("the safetensors header is not a JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedBody(f"the safetensors header's {_METADATA} must map strings to strings", field=_METADATA)
    entries = tuple(_entry(name, fields) for name, fields in header.items())
    size = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != size:
            raise MalformedBody(
                f"{entry.name[:200]}: the tensors overlap or leave a hole",
                field=entry.name[:200],
                expected=size,
                got=entry.begin,
            )
        size = entry.end
    return _Layout(entries, metadata, size)


# A caller sends the same header again and again. 256 short headers are kept.
_cached_layout = lru_cache(maxsize=256)(_layout)
_cached_long_layout = lru_cache(maxsize=8)(_layout)  # a megabyte each


def _entry(name: str, fields: Any) -> _Entry:
    """One tensor of a header, checked by itself."""
    field = name[:200]
    if not isinstance(fields, dict) or fields.keys() != _ENTRY:
        raise MalformedBody(f"{field}: must say dtype, shape and data_offsets", field=field, expected=sorted(_ENTRY))
    dtype = _dtype(fields["dtype"], field)
    item = itemsize(dtype)
    shape = checked_shape(fields["shape"], item, field=field)
    match fields["data_offsets"]:
        case [begin, end] if type(begin) is type(end) is int and 0 <= begin <= end <= MAX_BYTES:
            size = math.prod(shape) * item
            if end - begin == size:
                return _Entry(name, dtype, shape, begin, end)
            raise MalformedBody(
                f"{field}: {dtype} of shape {list(shape)} has {size} bytes; data_offsets span {end - begin}",
                field=field,
                expected=size,
                got=end - begin,
            )
    raise MalformedBody(f"{field}: data_offsets must be two non-negative integers in order", field=field)


def _dtype(code: Any, field: str) -> str:
    """Torch's name of a dtype."""
    if isinstance(code, str) and code in _NAMES:
        return _NAMES[code]
    if isinstance(code, str) and code in _SMALLER_THAN_A_BYTE:
        raise DtypeMismatch(
            f"{field}: {code} is not read",
            field=field,
            expected=["float16", "bfloat16", "float32", "float64"],
            got=code,
        )
    raise MalformedBody(
        f"{field}: no such dtype", field=field, expected=list(_NAMES), got=code[:40] if isinstance(code, str) else None
    )
