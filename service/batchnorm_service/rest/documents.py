"""Parses JSON request bodies strictly into pydantic models; problems name the invalid field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from batchnorm_client.kernels.digest import DIGEST_PATTERN, DIGEST_RULE
from batchnorm_client.wire.documents import MAX_FEATURES, LayerUpdate
from batchnorm_client.wire.errors import InvalidRequest, MalformedBody, shown
from batchnorm_client.wire.names import STATE_PATTERN, STATE_RULE, TAG_PATTERN, TAG_RULE
from batchnorm_client.wire.tensors import load_json, split_vectors

Model = TypeVar("Model", bound=BaseModel)

_VECTORS: Final = ("weight", "bias")
_LARGE_UPDATE: Final = 1 << 14
"""Bytes. In a larger LayerUpdate, weight and bias are parsed as tensors: pydantic would check each number in Python."""

_SHOWN_ERRORS: Final = 20

_RULES: Final = {
    f"^({TAG_PATTERN.pattern})$": TAG_RULE,
    f"^({STATE_PATTERN.pattern})$": STATE_RULE,
    f"^{DIGEST_PATTERN.pattern}$": DIGEST_RULE,
}
"""Patterns of fields and parameters in words, for people; `expected` has the pattern."""


def parse_document(model: type[Model], body: bytes | bytearray | memoryview) -> Model:
    """The body as a `model`. In a large LayerUpdate, weight and bias are tensors."""
    if model is LayerUpdate and len(body) > _LARGE_UPDATE and (split := split_vectors(body, _VECTORS)):
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
    """The problem for a pydantic validation error: the first error's field and expectation, and `errors` if several.

    Args:
        errors: pydantic's `ErrorDetails`.
        known: the names of the valid fields.
    """
    # pydantic reports a default_factory that it could not call because another field is invalid: a consequence only.
    errors = [each for each in errors if each["type"] != "default_factory_not_called"]
    described = [_describe(details, known) for details in errors[:_SHOWN_ERRORS]]
    first = described[0]
    count = len(errors)
    detail = f"{first['field']}: {first.pop('detail')}"
    if count == 1:
        return InvalidRequest(detail, **first)
    for other in described[1:]:
        other["detail"] = f"{other['field']}: {other['detail']}"
    errors_shown = [{**first, "detail": detail}, *described[1:]]
    return InvalidRequest(f"{detail} (and {count - 1} more, see errors)", **first, errors=errors_shown)


def _describe(details: ErrorDetails, known: Sequence[str]) -> dict[str, Any]:
    message = details["msg"].removeprefix("Value error, ")
    described: dict[str, Any] = {"field": ".".join(map(str, details["loc"]))[:200] or "body", "detail": message}
    value = details["input"]
    match details["type"]:
        case "extra_forbidden":
            described["detail"] = f"is not known; known are {', '.join(known)}" if known else "is not known"
            described["expected"] = list(known)
        case "missing":
            described["detail"] = "is missing"
            described["expected"] = "a value"
        case _:
            described["expected"] = message.removeprefix("Input should be ")
            if value is None or isinstance(value, bool | int | float):
                described["got"] = value
            elif isinstance(value, str):
                described["got"] = value[:200]
                if (pattern := details.get("ctx", {}).get("pattern")) in _RULES:
                    described |= {"detail": f"{shown(value)} is no {_RULES[pattern]}", "expected": pattern}
    return described
