"""The target for bodies of the Open Inference Protocol."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np
import orjson
import torch

from batchnorm_client.wire.errors import InvalidRequest, MalformedBody, ShapeMismatch
from batchnorm_client.wire.tensors import Tensor, regular_json, widened
from batchnorm_service.open_inference import codec, request_object
from batchnorm_service.open_inference.documents import DTYPES
from fuzz.promises import BrokenPromiseError, Refused, attempt, replaced, same
from fuzz.tensors import NON_FINITE, raw

_REFUSALS = (MalformedBody, InvalidRequest, ShapeMismatch)
_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def read_inference(data: bytes) -> None:
    """A request is refused, or has the tensor that its JSON object and its bytes say, whichever reader reads it."""
    length, body = (None, data[1:]) if data[0] % 2 else (int.from_bytes(data[1:3], "big"), data[3:])
    found = attempt(codec.read_request, body, length, refusals=_REFUSALS)
    for piece in (5, regular_json.PIECE_BYTES):
        with replaced(request_object, _LARGE=0, _PIECE=piece), replaced(regular_json, PIECE_BYTES=piece):
            again = attempt(codec.read_request, body, length, refusals=_REFUSALS)
        same(_comparable(again), _comparable(found), "what the reader of large requests found")
    for dtype, shape in (("float32", [-1, 3]), ("float64", [-1, -1, 2])):
        attempt(codec.read_raw, body, dtype, shape, refusals=_REFUSALS)
    if isinstance(found, Refused):
        return
    text, rest = (body, b"") if length is None else (body[:length], body[length:])
    document = orjson.loads(text)
    (given,) = document["inputs"]
    tensor = found.tensor
    same((tensor.dtype, list(tensor.shape)), (DTYPES[given["datatype"]], given["shape"]), "what is declared")
    if given.get("data") is None:
        same(bytes(tensor.buffer), rest, "the bytes")
    else:
        same(rest, b"", "bytes after numbers")
        _check_numbers(tensor, _flat(given["data"]))
    same(found.id, document.get("id"), "the id")
    _check_response(found, document.get("id"))


def _comparable(found: Any) -> Any:
    return found if isinstance(found, Refused) else (found.binary, found.id, raw(found.tensor))


def _flat(nested: Any) -> list[float]:
    level = [nested]
    while level and isinstance(level[0], list):
        level = list(chain.from_iterable(level))
    return [NON_FINITE[value] if isinstance(value, str) else float(value) for value in level]


def _check_numbers(tensor: Tensor, given: list[float]) -> None:
    """Each is the number that was given, or none of the dtype is nearer to it."""
    same(len(given), math.prod(tensor.shape), "how many numbers there are")
    if not given:
        return
    found = torch.frombuffer(bytearray(tensor.buffer), dtype=_TORCH[tensor.dtype])
    near = found.double().numpy()
    wide = np.array(given)
    same(np.isnan(near).tolist(), np.isnan(wide).tolist(), "which are NaN")
    if tensor.dtype in {"float16", "bfloat16"}:
        bits = found.view(torch.int16)
        others = [(bits + step).view(found.dtype).double().numpy() for step in (1, -1)]
    else:
        array = found.numpy()
        others = [np.nextafter(array, toward).astype(np.float64) for toward in (array.dtype.type(np.inf), -np.inf)]
    finite = np.isfinite(wide)
    same(near[~finite & ~np.isnan(wide)].tolist(), wide[~finite & ~np.isnan(wide)].tolist(), "the infinite ones")
    with np.errstate(invalid="ignore", over="ignore"):
        nearer = [(np.abs(other - wide) < np.abs(near - wide)) & np.isfinite(other) for other in others]
    if (finite & (nearer[0] | nearer[1])).any() or not np.isfinite(near[finite]).all():
        raise BrokenPromiseError(f"{near!r} instead of {wide!r}")


def _check_response(call: Any, name: Any) -> None:
    """The response with the same tensor reads back."""
    pieces, length = codec.write_response(call, {"id": name}, call.tensor)
    body = b"".join(pieces)
    document = orjson.loads(body if length is None else body[:length])
    (output,) = document["outputs"]
    same((document["id"], output["shape"]), (name, list(call.tensor.shape)), "the response")
    if length is None:
        array = widened(call.tensor).ravel()
        numbers = np.array(_flat(output["data"]), np.float64).astype(array.dtype)
        same(np.array_equal(numbers, array, equal_nan=True), True, "the numbers")
    else:
        same(body[length:], bytes(call.tensor.buffer), "the bytes")
        same(output["parameters"], {"binary_data_size": len(body) - length}, "their size")
