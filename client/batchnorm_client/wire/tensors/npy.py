"""The .npy file (NEP 1): one tensor. Pickled objects are never read."""

from __future__ import annotations

import ast
import io
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np

from batchnorm_client.wire.errors import DtypeMismatch, MalformedBody
from batchnorm_client.wire.tensors.tensor import NUMPY_DTYPES, Buffer, Tensor, byte_view, checked_shape, view_tensor

NPY_DTYPES: Final = frozenset(NUMPY_DTYPES)
"""The dtypes that the form has: numpy's."""

_MAGIC: Final = b"\x93NUMPY"
_LENGTH_WIDTHS: Final = {(1, 0): 2, (2, 0): 4, (3, 0): 4}
_MAX_HEADER: Final = 4096  # 64 dimensions of 20 digits take 1,400 bytes
_MAX_CACHED: Final = 1024
_KEYS: Final = {"descr", "fortran_order", "shape"}
_NAMES: Final = {dtype.str: name for name, dtype in NUMPY_DTYPES.items()}
_OBJECT: Final = re.compile(r"[<>|=]?O[0-9]*")

_Header = dict[str, Any]


def decode_npy(body: Buffer, dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """The one tensor of a .npy file, as a view of the body, under the only name in `dtypes`.

    Raises:
        MalformedBody: not a .npy file, or one that declares another length than it has; pickled objects; Fortran order.
        DtypeMismatch: big-endian, or a dtype that cannot be sent.
    """
    (field,) = dtypes
    view = byte_view(body)
    text, start = _split(view)
    header = _cached_header(text) if len(text) < _MAX_CACHED else _header(text)
    dtype = _dtype(header["descr"], field)
    item = NUMPY_DTYPES[dtype].itemsize
    shape = checked_shape(header["shape"], item, field=field)
    if header["fortran_order"] and len(shape) > 1:
        raise MalformedBody(f"{field}: in Fortran order; save np.ascontiguousarray(array) instead", field=field)
    expected = start + math.prod(shape) * item
    if len(view) != expected:
        raise MalformedBody(
            f"{field}: {dtype} of shape {list(shape)} makes a file of {expected} bytes; the body has {len(view)}",
            field=field,
            expected=expected,
            got=len(view),
        )
    return {field: view_tensor(dtype, shape, view[start:])}


def npy_data_start(body: Buffer) -> int:
    """Where the data of a version 1.0 file begin."""
    return 10 + int.from_bytes(body[8:10], "little")


def encode_npy(tensors: Mapping[str, Tensor], _fields: Mapping[str, Any]) -> list[Buffer]:
    """A .npy file, version 1.0: its header, then the tensor's own buffer.

    Args:
        tensors: one, of a dtype that numpy has.
    """
    (tensor,) = tensors.values()
    header = _written_header(tensor.dtype, tensor.shape)
    return [header, tensor.buffer] if tensor.nbytes else [header]


def _split(view: memoryview) -> tuple[bytes, int]:
    """The header's text, and where the data start."""
    if bytes(view[:6]) != _MAGIC or len(view) < 8:
        raise MalformedBody("not a .npy file: it does not begin with \\x93NUMPY and a version")
    version = (view[6], view[7])
    width = _LENGTH_WIDTHS.get(version)
    if width is None:
        raise MalformedBody(
            f".npy version {version[0]}.{version[1]} is not known", expected=["1.0", "2.0", "3.0"], got=list(version)
        )
    length = int.from_bytes(view[8 : 8 + width], "little")
    start = 8 + width + length
    if length > _MAX_HEADER:
        raise MalformedBody("the .npy header is too large", expected=_MAX_HEADER, got=length)
    if start > len(view):
        raise MalformedBody("the .npy header is cut off", expected=start, got=len(view))
    return bytes(view[8 + width : start]), start


def _header(text: bytes) -> _Header:
    """The header's dictionary, read as numpy does, with Python literals only; numpy has no public reader for 3.0."""
    try:
        if b"\\" in text:  # no header has one; Python would warn of unknown escapes
            raise ValueError
        header = ast.literal_eval(text.decode("latin1"))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise MalformedBody("the .npy header is not a Python dictionary") from None
    if not isinstance(header, dict) or header.keys() != _KEYS:
        raise MalformedBody("the .npy header must say descr, fortran_order and shape", expected=sorted(_KEYS))
    if not isinstance(header["fortran_order"], bool) or not isinstance(header["shape"], tuple):
        raise MalformedBody("the .npy header's fortran_order must be True or False, its shape a tuple")
    return header


# A caller sends the same header again and again. 256 headers below 1 KiB are kept.
_cached_header = lru_cache(maxsize=256)(_header)


def _dtype(descr: Any, field: str) -> str:
    """The name of the dtype that a header declares."""
    if not isinstance(descr, str) or "," in descr or _OBJECT.fullmatch(descr):
        raise MalformedBody(
            f"{field}: pickled objects and structured arrays are never read; send an array of numbers", field=field
        )
    name = _NAMES.get(descr)
    if name is None:
        raise DtypeMismatch(
            f"{field}: the dtype {descr[:40]!r} is not read; send little-endian floating-point numbers",
            field=field,
            expected=["float16", "float32", "float64"],
            got=descr[:40],
        )
    return name


@lru_cache(maxsize=256)
def _written_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    header = {"descr": NUMPY_DTYPES[dtype].str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()
