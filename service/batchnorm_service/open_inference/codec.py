"""Bodies of inference requests and responses: a JSON object, then the bytes of tensors (binary tensor data extension).

    request: Inference-Header-Content-Length: n | n bytes of JSON | binary_data_size bytes of the input
    response: the same with the output

Without that header all of the body is JSON; with n = 0 all of it is the input ("raw binary request").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import orjson

from batchnorm_client.wire.errors import InvalidRequest, MalformedBody, ShapeMismatch
from batchnorm_client.wire.tensors import Tensor, itemsize
from batchnorm_client.wire.tensors.json_writer import flat_pieces
from batchnorm_client.wire.tensors.tensor import Buffer, byte_view, checked_shape, view_tensor
from batchnorm_service.rest.headers import Headers

from .documents import (
    DATATYPES,
    DTYPES,
    INPUT,
    OUTPUT,
    InferenceRequest,
    RequestInput,
)
from .numbers import numbers_in
from .request_object import read_object

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_HEADER_LENGTH: Final = HEADER_LENGTH.lower().encode()


class InferenceCall(NamedTuple):
    """An inference request that was read.

    Attributes:
        request: its JSON object, of which `id` does not count.
        id: its id.
        tensor: the input.
        binary: whether the output is to be sent as bytes.
        text: whether the input or the output is JSON.
    """

    request: InferenceRequest
    id: str | None
    tensor: Tensor
    binary: bool
    text: bool


def header_length(headers: Headers) -> int | None:
    """How many bytes of the body are JSON; None for all of them.

    Raises:
        MalformedBody: the header is not a number, or repeated.
    """
    given = headers.get(_HEADER_LENGTH)
    if given is None:
        return None
    if not (given.isdigit() and len(given) <= 18):
        raise MalformedBody(
            f"{HEADER_LENGTH} must be a number of bytes, and given once",
            field=HEADER_LENGTH,
            expected="a number",
            got=given.decode("latin-1")[:100],
        )
    return int(given)


def read_request(body: Buffer, length: int | None) -> InferenceCall:
    """The inference request in a body whose first `length` bytes are JSON; None for all bytes.

    Raises:
        MalformedBody: not JSON, or the declared sizes are not those of the bytes that are there.
        InvalidRequest: a field is unknown, missing or invalid; a number does not fit its datatype.
        ShapeMismatch: the numbers do not have the declared shape.
    """
    view = byte_view(body)
    if length is not None and length > len(view):
        raise MalformedBody(
            f"{HEADER_LENGTH} is {length}; the body has {len(view)} bytes",
            field=HEADER_LENGTH,
            expected=f"at most {len(view)}",
            got=length,
        )
    text, rest = (view, view[:0]) if length is None else (view[:length], view[length:])
    request, name, tensor = read_object(text, alone=length is None)
    given = request.inputs[0]
    is_text = given.parameters.binary_data_size is None
    tensor = _from_numbers(given, rest, tensor) if is_text else _from_bytes(given, rest)
    binary = request.parameters.binary_data_output
    if request.outputs and (chosen := request.outputs[0].parameters.binary_data) is not None:
        binary = chosen
    return InferenceCall(request, name, tensor, binary, is_text or not binary)


RAW_REQUEST: Final = InferenceRequest.model_construct(
    parameters=InferenceRequest.model_fields["parameters"].default.model_copy(update={"binary_data_output": True}),
    inputs=[],
)


def read_raw(body: Buffer, dtype: str, shape: list[int]) -> InferenceCall:
    """The inference request of a body that is the input only, whose one free dimension follows from its length.

    Args:
        body: the input's bytes.
        dtype: of the layer.
        shape: that the layer's metadata declare, with -1 for a free dimension.

    Raises:
        InvalidRequest: the shape has more than one free dimension.
        MalformedBody: the length is no multiple of what the others make.
    """
    view = byte_view(body)
    if shape.count(-1) != 1:
        raise InvalidRequest(
            f"{HEADER_LENGTH}: without a JSON object the input's shape is not known, of which {shape} are free",
            field=HEADER_LENGTH,
            expected="the length of a JSON object",
            got=0,
        )
    step = itemsize(dtype) * math.prod(n for n in shape if n >= 0)
    if len(view) % step:
        raise MalformedBody(
            f"{INPUT}: {dtype} of shape {shape} has a multiple of {step} bytes; the body has {len(view)}",
            field=INPUT,
            expected=step,
            got=len(view),
        )
    whole = tuple(len(view) // step if n < 0 else n for n in shape)
    return InferenceCall(RAW_REQUEST, None, view_tensor(dtype, whole, view), binary=True, text=False)


def write_response(call: InferenceCall, document: Mapping[str, Any], tensor: Tensor) -> tuple[list[Buffer], int | None]:
    """A response's body in pieces, and how many of its bytes are JSON; None for all of them.

    Args:
        call: the request.
        document: the members of the JSON object beside `outputs`.
        tensor: the output.
    """
    output: dict[str, Any] = {"name": OUTPUT, "shape": tensor.shape, "datatype": DATATYPES[tensor.dtype]}
    if call.binary:
        output["parameters"] = {"binary_data_size": tensor.nbytes}
        head = orjson.dumps({**document, "outputs": [output]})
        return [head, tensor.buffer] if tensor.nbytes else [head], len(head)
    head = orjson.dumps({**document, "outputs": [output]})
    return [head[:-3] + b',"data":', *flat_pieces(tensor), b"}]}"], None


def _from_bytes(given: RequestInput, rest: memoryview) -> Tensor:
    size = given.parameters.binary_data_size
    if given.data is not None:
        raise InvalidRequest(
            "inputs.0: has data and binary_data_size; send one of them", field="inputs.0.data", expected="no data"
        )
    dtype = DTYPES[given.datatype]
    shape = checked_shape(given.shape, itemsize(dtype), field=INPUT)
    expected = math.prod(shape) * itemsize(dtype)
    if size != expected:
        raise MalformedBody(
            f"{INPUT}: {given.datatype} of shape {given.shape} has {expected} bytes; binary_data_size is {size}",
            field="inputs.0.parameters.binary_data_size",
            expected=expected,
            got=size,
        )
    _check_rest(rest, expected)
    return view_tensor(dtype, shape, rest)


def _from_numbers(given: RequestInput, rest: memoryview, tensor: Tensor | None) -> Tensor:
    if given.data is None:
        raise InvalidRequest(
            "inputs.0.data: is missing, and so is the parameter binary_data_size",
            field="inputs.0.data",
            expected="a list of numbers",
        )
    _check_rest(rest, 0)
    dtype = DTYPES[given.datatype]
    shape = checked_shape(given.shape, itemsize(dtype), field=INPUT)
    if tensor is None:
        tensor = numbers_in(given.data, dtype)
    if tensor.shape not in (shape, (math.prod(shape),)):
        raise ShapeMismatch(
            f"{INPUT}: the shape is {given.shape}; data has {list(tensor.shape)}",
            field="inputs.0.data",
            expected=given.shape,
            got=list(tensor.shape),
        )
    return Tensor.unchecked(dtype, shape, tensor.buffer)


def _check_rest(rest: memoryview, expected: int) -> None:
    """Check how many bytes follow the JSON object."""
    if len(rest) != expected:
        raise MalformedBody(
            f"the JSON object declares {expected} bytes of tensors; after it, as {HEADER_LENGTH} says where it ends,"
            f" the body has {len(rest)}",
            field=HEADER_LENGTH,
            expected=expected,
            got=len(rest),
        )
