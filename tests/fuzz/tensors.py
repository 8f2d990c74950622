"""Targets for the tensor codecs: each is compared with another reader of the same form."""

from __future__ import annotations

import io
import json
import math
import warnings
from itertools import chain
from typing import Any

import numpy as np
import orjson
import safetensors

from batchnorm_client.wire.errors import DtypeMismatch, InvalidRequest, MalformedBody
from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS
from batchnorm_client.wire.tensors import (
    CODECS,
    Tensor,
    bytes_read,
    decode,
    decode_safetensors,
    decode_safetensors_header,
    encode,
    encode_safetensors,
    itemsize,
    json_writer,
    regular_json,
    widened,
)
from batchnorm_client.wire.tensors import json as json_reader
from batchnorm_client.wire.tensors.safetensors import SAFETENSORS_DTYPES
from fuzz.promises import BrokenPromiseError, Refused, attempt, replaced, same

KNOWN = (
    {"input": "float32"},
    {"input": "float64"},
    {"count": "int64", "mean": "float64", "var": "float64"},
    {"input": "float32", "grad_output": "float32"},
)
"""Names and dtypes that an endpoint reads, chosen by an input's first byte."""

READERS = tuple((parser, piece) for parser in (regular_json.simdjson, None) for piece in (5, regular_json.PIECE_BYTES))
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
TIE = 7.038531e-26
"""The one shortest text of a float32 that rounds to another by way of float64; it is read as the float32."""

DTYPES = sorted(SAFETENSORS_DTYPES)


def raw(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor as values that can be compared."""
    return tensor.dtype, tensor.shape, bytes(tensor.buffer)


def raw_all(found: Any) -> Any:
    """Tensors by name as values that can be compared; a refusal as it is."""
    return found if isinstance(found, Refused) else {name: raw(tensor) for name, tensor in found.items()}


def read_json(data: bytes) -> None:
    """Each reader of JSON finds what orjson and numpy find, or all refuse, for the same reason."""
    dtypes, body = KNOWN[data[0] % len(KNOWN)], data[1:]
    expected = _json_reference(body, dtypes)
    refusals = [_json_attempt(body, dtypes)]
    for parser, piece in READERS:
        with replaced(json_reader, _FAST_FROM=0), replaced(regular_json, simdjson=parser, PIECE_BYTES=piece):
            refusals.append(_json_attempt(body, dtypes))
    for found in refusals:
        if expected is None and isinstance(found, Refused):
            same(found, refusals[0], "why the readers refuse")
        else:
            same(found, expected, "what a reader found")


def _json_attempt(body: bytes, dtypes: dict[str, str]) -> Any:
    return raw_all(attempt(decode, JSON, body, dtypes, refusals=(MalformedBody, InvalidRequest)))


def _json_reference(body: bytes, dtypes: dict[str, str]) -> dict[str, Any] | None:
    """The tensors by orjson and numpy; None for what is to be refused."""
    try:
        document = orjson.loads(body)
        if not isinstance(document, dict) or not document.keys() <= dtypes.keys():
            return None
        return {name: raw(Tensor.of(_array(value, dtypes[name]))) for name, value in document.items()}
    except ValueError:
        return None


def _array(nested: Any, dtype: str) -> np.ndarray:
    shape = _shape(nested, 0)
    flat = [nested]
    for _ in shape:
        flat = list(chain.from_iterable(flat))
    if dtype == "int64":
        if not all(type(value) is int and -(2**63) <= value < 2**63 for value in flat):
            raise ValueError("not integers")
        return np.array(flat, np.int64).reshape(shape)
    numbers = [NON_FINITE.get(value, value) if isinstance(value, str) else value for value in flat]
    if not all(type(value) in {int, float} for value in numbers):
        raise ValueError("not numbers")
    wide = np.array([float(value) for value in numbers], np.float64).reshape(shape)
    if dtype == "float64":
        return wide
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if (np.isinf(narrow) != np.isinf(wide)).any():
        raise ValueError("too large for float32")
    return np.where(np.abs(wide) == TIE, np.nextafter(narrow, np.float32(0)), narrow)


def _shape(nested: Any, depth: int) -> tuple[int, ...]:
    if not isinstance(nested, list):
        return ()
    if depth == 64:
        raise ValueError("too deep")
    inner = {_shape(each, depth + 1) for each in nested}
    if len(inner) > 1:
        raise ValueError("ragged")
    return len(nested), *(inner.pop() if inner else ())


def read_npy(data: bytes) -> None:
    """What is accepted, numpy reads too, and finds the same."""
    found = attempt(decode, NPY, data, {"input": "float32"}, refusals=(MalformedBody, DtypeMismatch))
    copied = bytes_read(NPY, data)
    if isinstance(found, Refused):
        return
    same(copied in {0, len(data)}, True, "how much is copied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    tensor = found["input"]
    same(raw(tensor), (array.dtype.name, array.shape, array.tobytes()), "the array")
    written = b"".join(encode(NPY, {"input": tensor}))
    same(raw(decode(NPY, written, {"input": ""})["input"]), raw(tensor), "the array, written and read")


def read_safetensors(data: bytes) -> None:
    """The same tensors and metadata as those of the library, which refuses what is refused, except limits of ours."""
    found = attempt(decode_safetensors, data, refusals=(MalformedBody, DtypeMismatch))
    header = attempt(decode_safetensors_header, data, refusals=(MalformedBody, DtypeMismatch))
    bytes_read(SAFETENSORS, data)
    try:
        reference = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError:
        reference = None
    if isinstance(found, Refused):
        if reference is not None and found.kind is MalformedBody:
            _check_own_limit(data, reference)
        return
    tensors, metadata = found
    if reference is None:
        raise BrokenPromiseError("the library refuses what is accepted here")
    theirs = {name: (list(given["shape"]), bytes(given["data"])) for name, given in reference.items()}
    same({name: (list(tensor.shape), bytes(tensor.buffer)) for name, tensor in tensors.items()}, theirs, "the tensors")
    same(header[0].get("__metadata__", {}), metadata, "the metadata")
    again, metadata_again = decode_safetensors(b"".join(encode_safetensors(tensors, metadata)))
    same(raw_all(again), raw_all(tensors), "the tensors, written and read")
    same(metadata_again, metadata, "the metadata, written and read")


def _check_own_limit(data: bytes, reference: dict[str, Any]) -> None:
    """What the library takes and we do not: blanks before the header, which the format forbids; over 64 dimensions."""
    if data[8:9] == b"{" and all(len(given["shape"]) <= 64 for given in reference.values()):
        raise BrokenPromiseError(f"the library reads {reference!r:.2000}, here it is refused: {data[:200]!r}")


def write(data: bytes) -> None:
    """A tensor reads back as it was written, in every form that has its dtype; JSON is what Python's reader reads."""
    dtype, rank = DTYPES[data[0] % len(DTYPES)], int.from_bytes(data[1:2]) % 6
    shape = tuple(size % 7 for size in data[2 : 2 + rank])
    nbytes = math.prod(shape) * itemsize(dtype)
    content = data[2 + rank :] or b"\0"
    tensor = Tensor(dtype, shape, (content * (nbytes // len(content) + 1))[:nbytes])
    for media, codec in CODECS.items():
        if dtype in codec.dtypes and not codec.text:
            body = b"".join(encode(media, {"input": tensor}))
            same(raw(decode(media, body, {"input": dtype})["input"]), raw(tensor), media)
    if dtype in CODECS[JSON].dtypes and not (dtype == "bool" and set(bytes(tensor.buffer)) - {0, 1}):
        for most in (3, json_writer._PIECE_ELEMENTS):
            with replaced(json_writer, _PIECE_ELEMENTS=most):
                _check_text(b"".join(encode(JSON, {"input": tensor}, {"version": 7})), widened(tensor))


def _check_text(text: bytes, array: np.ndarray) -> None:
    """Text that holds an array's numbers, and a field after it."""
    document = json.loads(text)
    same(document.pop("version"), 7, "the field")
    same(list(document), ["input"], "the names")
    nested = np.array(document["input"], dtype=object)
    shape = array.shape
    same(nested.shape, shape[: shape.index(0) + 1] if 0 in shape else shape, "the shape")
    same(None in nested.ravel().tolist(), False, "whether a number is null")
    named = [NON_FINITE.get(value, value) if isinstance(value, str) else value for value in nested.ravel().tolist()]
    if not np.array_equal(np.array(named, array.dtype), array.ravel(), equal_nan=array.dtype.kind == "f"):
        raise BrokenPromiseError(f"the numbers: {text[:2000]!r} instead of {array!r}")
    if array.size and array.dtype.name in {"float32", "float64", "int64"}:
        again = decode(JSON, orjson.dumps({"input": document["input"]}), {"input": array.dtype.name})["input"].numpy()
        if not np.array_equal(np.signbit(again), np.signbit(array)) and not np.isnan(array).any():
            raise BrokenPromiseError("the sign of a zero")
        if not np.array_equal(again, array, equal_nan=array.dtype.kind == "f"):
            raise BrokenPromiseError(f"read back as {again!r} instead of {array!r}")
