"""JSON documents in: parsed strictly, checked by a pydantic model, refused with the field's name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from batchnorm_client.wire.documents import MAX_FEATURES, LayerUpdate
from batchnorm_client.wire.errors import InvalidRequest, MalformedBody
from batchnorm_client.wire.tensors import load_json, split_vectors

Model = TypeVar("Model", bound=BaseModel)

_VECTORS: Final = ("weight", "bias")
_VECTORS_FROM: Final = 1 << 14
"""Of an update that is longer, the vectors are read as tensors: pydantic looks at each number by itself."""

_SHOWN_ERRORS: Final = 20


def parse_document(model: type[Model], body: bytes | bytearray | memoryview) -> Model:
    """The body as a `model`. Of a large LayerUpdate, weight and bias are tensors."""
    if model is LayerUpdate and len(body) > _VECTORS_FROM and (split := split_vectors(body, _VECTORS)):
        others, vectors = split
        if all(math.prod(vector.shape) <= MAX_FEATURES for vector in vectors.values()):
            return _validated(model, others).model_copy(update=vectors)
    value = load_json(body)
    if not isinstance(value, dict):
        raise MalformedBody("the body must be a JSON object")
    return _validated(model, value)


def _validated(model: type[Model], value: dict[str, Any]) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False), list(model.model_fields)) from None


def invalid_request(errors: Sequence[Any], known: Sequence[str] = ()) -> InvalidRequest:
    """What pydantic refused, as a problem: the first error's field and expectation, and `errors` if there are more.

    Args:
        errors: `ErrorDetails`, as pydantic lists them.
        known: the fields that there are.
    """
    # A default that is made from other fields is not made, and reported as an error, when one of them is wrong.
    wrong = [each for each in errors if each["type"] != "default_factory_not_called"]
    found = [_described(details, known) for details in wrong[:_SHOWN_ERRORS]]
    first = found[0]
    count = len(wrong)
    detail = f"{first['field']}: {first.pop('detail')}"
    if count == 1:
        return InvalidRequest(detail, **first)
    for other in found[1:]:
        other["detail"] = f"{other['field']}: {other['detail']}"
    errors_shown = [{**first, "detail": detail}, *found[1:]]
    return InvalidRequest(f"{detail} (and {count - 1} more, see errors)", **first, errors=errors_shown)


def _described(details: ErrorDetails, known: Sequence[str]) -> dict[str, Any]:
    message = details["msg"].removeprefix("Value error, ")
    described: dict[str, Any] = {"field": ".".join(map(str, details["loc"]))[:200] or "body", "detail": message}
    given = details["input"]
    match details["type"]:
        case "extra_forbidden":
            described["detail"] = f"is not known; known are {', '.join(known)}" if known else "is not known"
            described["expected"] = list(known)
        case "missing":
            described["detail"] = "is missing"
            described["expected"] = "a value"
        case _:
            described["expected"] = message.removeprefix("Input should be ")
            if given is None or isinstance(given, bool | int | float):
                described["got"] = given
            elif isinstance(given, str):
                described["got"] = given[:200]
    return described
