"""The writer of JSON tensors: nested lists, in pieces that are each written with one call of orjson."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import orjson

from batchnorm_client.wire.tensors.brackets import empty_lists, rewrapped
from batchnorm_client.wire.tensors.regular_json import NON_FINITE
from batchnorm_client.wire.tensors.tensor import NUMPY_DTYPES, Array, Buffer, Tensor

JSON_DTYPES: Final = frozenset({"bfloat16", *NUMPY_DTYPES} - {"complex64"})
"""The dtypes that can be written; float16 and bfloat16 are widened to float32, which is exact."""

_OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z
_PIECE_ELEMENTS: Final = 1 << 15  # that are written with one call


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


def flat_pieces(tensor: Tensor) -> list[Buffer]:
    """The text of one list with all of a tensor's numbers in C order, in pieces."""
    flat = Tensor.unchecked(tensor.dtype, (math.prod(tensor.shape),), tensor.buffer)
    return [*_list_pieces(widened(flat))] if tensor.nbytes else [b"[]"]


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
    names = [b'"%b"' % name.encode() for name in NON_FINITE]
    between = text.split(b"null")
    parts = [b""] * (2 * len(between) - 1)
    parts[::2] = between
    parts[1::2] = [names[kind] for kind in kinds.tolist()]
    return b"".join(parts)


def widened(tensor: Tensor) -> Array:
    """An array of a tensor's numbers, exactly; float16 and bfloat16 become float32."""
    if tensor.dtype == "bfloat16":  # the upper half of a float32
        halves = np.ndarray(tensor.shape, "<u2", buffer=tensor.buffer)
        wide = np.asarray(np.left_shift(halves, 16, dtype=np.uint32))  # numpy makes a number of an array without axes
        return wide.view(np.float32)
    array = tensor.numpy()
    return array.astype(np.float32) if tensor.dtype == "float16" else array
