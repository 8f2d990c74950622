"""Error responses as exceptions."""

from __future__ import annotations

import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from batchnorm_client.core.messages import Response
from batchnorm_client.wire.errors import (
    PROBLEMS,
    BatchNormError,
    NoAnswer,
    PayloadTooLarge,
    ProblemError,
    UnexpectedAnswer,
)
from batchnorm_client.wire.headers import REQUEST_ID
from batchnorm_client.wire.media_types import JSON, PROBLEM_JSON

_ADVICE = {
    "BATCHNORM_MAX_": "the limit is the service's setting BATCHNORM_MAX_BODY_BYTES",
    "train_local": "train_local and eval_local do not send the batch, whatever its size",
}
"""Advice about a body that is too large: added as a note if the service's text does not contain the word."""

_WITHOUT_EFFECT = {"overloaded", "not-implemented", "group-incomplete"}
"""Problems with a status from 500 on that a call has only before it takes effect."""

_STANDARD = {"type", "title", "status", "detail", "instance"}
_SECONDS = re.compile(r"[0-9]{1,9}")


def error_of(response: Response, date: float | None = None) -> ProblemError | UnexpectedAnswer:
    """The exception for a response with an unexpected status.

    Args:
        response: the response.
        date: the present time in seconds since 1970; without it, a Retry-After that is a date is ignored.
    """
    document = _document(response)
    request_id = response.headers.get(REQUEST_ID.lower())
    error: ProblemError | UnexpectedAnswer | None = problem_of(document, request_id)
    if error is None:
        name = str(document.get("type", "")).rpartition("/")[2]
        error = UnexpectedAnswer(_detail(response, document), status=response.status, name=name or None)
        error.fields.update(_fields(document))
        error.request_id = request_id
    error.retry_after = _retry_after(response.headers.get("retry-after", ""), date)
    return error


def problem_of(document: dict[str, Any], request_id: str | None) -> ProblemError | None:
    """The exception for a problem document; None if this client does not know its type."""
    name = str(document.get("type", "")).rpartition("/")[2]
    if name not in PROBLEMS:
        return None
    error = PROBLEMS[name](str(document.get("detail") or PROBLEMS[name].title))
    if isinstance(error, PayloadTooLarge):
        for word, advice in _ADVICE.items():
            if word not in error.detail:
                error.add_note(advice)
    # Not as keyword arguments, since members may have any name.
    error.fields.update(_fields(document))
    error.request_id = request_id
    return error


def may_have_taken_effect(error: BatchNormError) -> bool:
    """Whether a call that ended in this error may have taken effect all the same."""
    if isinstance(error, NoAnswer):
        return error.outcome_unknown
    if isinstance(error, ProblemError | UnexpectedAnswer):
        return not 400 <= error.status < 500 and error.name not in _WITHOUT_EFFECT
    return False


def _fields(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in _STANDARD}


def unreadable(response: Response, why: Exception) -> UnexpectedAnswer:
    """The exception for a response with an expected status whose body or headers are not as specified."""
    return UnexpectedAnswer(
        f"the answer cannot be read: {why}",
        status=response.status,
        request_id=response.headers.get(REQUEST_ID.lower()),
    )


def _document(response: Response) -> dict[str, Any]:
    """The problem document; empty if the response has none."""
    if response.media_type not in {PROBLEM_JSON, JSON}:
        return {}
    try:
        document = orjson.loads(response.body)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) and isinstance(document.get("type"), str) else {}


def _detail(response: Response, document: dict[str, Any]) -> str:
    for member in ("detail", "title"):
        if isinstance(document.get(member), str):
            return f"status {response.status}: {document[member]}"
    kind = response.media_type or "no Content-Type"
    if response.status == 413:
        return f"status 413 ({kind}): something before the service takes no body of this size; {_ADVICE['train_local']}"
    return f"status {response.status} ({kind}) is no answer of a batch-normalization service; is something in between?"


def _retry_after(value: str, now: float | None) -> float | None:
    """Seconds to wait, from Retry-After in either of its forms (RFC 9110, 10.2.3): seconds, or a date."""
    value = value.strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    if now is None:
        return None
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, IndexError, TypeError, OverflowError):
        return None
    if date.tzinfo is None:  # "-0000", or an unknown time zone: HTTP dates are GMT
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - now)
