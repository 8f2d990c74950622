"""Reads the JSON object of an inference request: quickly if it is one that came before, or if it is large."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from pydantic import ValidationError

from batchnorm_client.wire.documents import Document
from batchnorm_client.wire.errors import InvalidRequest, MalformedBody, RequestError
from batchnorm_client.wire.tensors import Tensor, load_json
from batchnorm_client.wire.tensors.regular_json import UnusualError
from batchnorm_service.rest.documents import invalid_request

from .documents import (
    DTYPES,
    InferenceRequest,
    InputParameters,
    OutputParameters,
    RequestInput,
    RequestOutput,
    RequestParameters,
)
from .numbers import read_numbers

_MAX_CACHED: Final = 1024  # bytes of JSON before the bytes of tensors
_LARGE: Final = 1 << 14  # bytes of JSON; in less, the numbers are parsed with the rest
_LARGEST_FRAME: Final = 1 << 14  # bytes of JSON beside the numbers
_MOST_MEMBERS: Final = 1000
_PIECE: Final = 1 << 17
_DATA: Final = b'"data"'
_COLON: Final = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(?=\[)")
_NEXT_KEY: Final = re.compile(rb',[ \t\r\n]*"\w+"[ \t\r\n]*\Z')
_ID: Final = re.compile(rb'"id"[ \t\r\n]*:[ \t\r\n]*"([ !#-\[\]-~]{1,200})"')
_LONGEST_KEY: Final = 64

_OBJECTS: Final[Mapping[tuple[str, ...], type[Document]]] = {
    (): InferenceRequest,
    ("parameters",): RequestParameters,
    ("inputs",): RequestInput,
    ("inputs", "parameters"): InputParameters,
    ("outputs",): RequestOutput,
    ("outputs", "parameters"): OutputParameters,
}
"""By where they are in a request."""


def read_object(text: memoryview, *, alone: bool) -> tuple[InferenceRequest, str | None, Tensor | None]:
    """The JSON object of a request, its id, and the tensor of its numbers if that was read here.

    Args:
        text: the object; the `id` of the returned one does not count.
        alone: whether it is all of the body, and so has numbers.

    Raises:
        MalformedBody: not a JSON object.
        InvalidRequest: a field is unknown, missing or invalid.
    """
    if not alone and len(text) <= _MAX_CACHED:
        return *_remembered(bytes(text)), None
    request, tensor = _load(text)
    return request, request.id, tensor


def _load(text: memoryview) -> tuple[InferenceRequest, Tensor | None]:
    """A request; if it is large, with the tensor of the array `data`, which has `true` in its place.

    Whatever is not read that way is parsed by one call, which decides why a request is refused.
    """
    refusal: RequestError | None = None
    if len(text) >= _LARGE and (found := _find_numbers(text)) is not None:
        begin, end = found
        frame = b"".join([text[:begin], b"true", text[end:]])
        # A backslash could write `data` in another way. Without, only the one key was `data`.
        if b"\\" not in frame:
            try:
                request = _validated(load_json(frame))
                if request.inputs[0].data is True:
                    return request, read_numbers(text[begin:end], DTYPES[request.inputs[0].datatype])
            except InvalidRequest as error:
                refusal = error
            except (MalformedBody, UnusualError):
                pass
    if len(text) >= _LARGE:
        _check_members(text)
    return _validated(load_json(text, refusal)), None


def _remembered(text: bytes) -> tuple[InferenceRequest, str | None]:
    """A request without numbers, and its id, which alone is often another than in the requests before."""
    found = _ID.search(text)
    # Without backslashes, no string has a quote, and no other text is this key.
    if found is None or b"\\" in text or text.count(b'"id"') > 1:
        request = _cached_request(text)
        return request, request.id
    return _cached_request(text[: found.start(1)] + text[found.end(1) :]), found[1].decode()


@lru_cache(maxsize=256)
def _cached_request(text: bytes) -> InferenceRequest:
    """A request without numbers, of which a caller sends the same again and again. It is not modified."""
    return _validated(load_json(text))


def _validated(document: Any) -> InferenceRequest:
    if not isinstance(document, dict):
        raise MalformedBody("the body must be a JSON object", expected="an object")
    try:
        return InferenceRequest.model_validate(document)
    except ValidationError as error:
        raise _invalid(error) from None


def _check_members(text: memoryview) -> None:
    """Refuse an object with very many members: pydantic would describe each that is not known."""
    colons = sum(bytes(text[begin : begin + _PIECE]).count(b":") for begin in range(0, len(text), _PIECE))
    if colons > _MOST_MEMBERS:
        raise InvalidRequest(
            f"body: more than {_MOST_MEMBERS} members; an inference request has about ten",
            field="body",
            expected=f"at most {_MOST_MEMBERS} members",
        )


def _find_numbers(text: memoryview) -> tuple[int, int] | None:
    """Where the array of the only key `data` begins and ends; None if it is unclear, or too much is beside it.

    Such an array has no braces and no colons. So it ends before the first brace, or before the next key.
    """
    key = _find(text, _DATA, 0)
    colon = None if key < 0 else _COLON.match(text, key + len(_DATA))
    if colon is None:
        return None
    begin = colon.end()
    end = _find(text, b"}", begin)
    if end < 0 or begin + len(text) - end > _LARGEST_FRAME:
        return None
    if (following := _find(text[:end], b":", begin)) >= 0:
        next_key = _NEXT_KEY.search(text, max(begin, following - _LONGEST_KEY), following)
        if next_key is None:
            return None
        end = next_key.start()
    return (begin, end) if _find(text, _DATA, end) < 0 else None


def _find(text: memoryview, what: bytes, start: int) -> int:
    """Where some bytes are, from `start` on; -1 if they are not. In pieces, between which other threads may run."""
    for begin in range(start, len(text), _PIECE):
        at = bytes(text[begin : begin + _PIECE + len(what) - 1]).find(what)
        if at >= 0:
            return begin + at
    return -1


def _invalid(error: ValidationError) -> InvalidRequest:
    """The problem; if a field is not known, it names those that are."""
    errors = error.errors(include_url=False)
    where = tuple(part for part in errors[0]["loc"][:-1] if isinstance(part, str))
    return invalid_request(errors, list(_OBJECTS[where].model_fields) if where in _OBJECTS else [])
