"""Turns exceptions into responses; no other module writes them.

They are problem documents, application/problem+json (RFC 9457); below /v2 they are what the Open Inference Protocol has
in their place: `{"error": "..."}`, with the same statuses and headers. An interface for people has pages instead.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import orjson
from starlette.exceptions import HTTPException

from batchnorm_client.wire.errors import (
    InternalError,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    ProblemError,
    StoreUnavailable,
    Unauthenticated,
    shown,
)
from batchnorm_client.wire.media_types import JSON, PROBLEM_JSON

from .headers import Headers
from .responses import RawHeader, Response

log = logging.getLogger(__name__)

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


ErrorPage = Callable[[ProblemError, dict[str, Any], Headers], Response | None]
"""Makes a page of a problem and its document, for a request with these headers; None if it wants no page."""

_NO_HEADERS: Final[Headers] = {}


def respond_problem(
    error: Exception, path: str, request_id: str, headers: Headers = _NO_HEADERS, pages: Iterable[ErrorPage] = ()
) -> Response:
    """The response to a request that raised `error`.

    An exception other than `ProblemError` is a bug: its traceback is logged, and the client gets the request id only.
    """
    document, media_type = problem_document(error, path, request_id), PROBLEM_JSON
    problem = _problem(error, path)
    for page in pages:
        if (shown_page := page(problem, document, headers)) is not None:
            shown_page.problem = problem.name
            shown_page.raw_headers += _headers(problem)
            return shown_page
    if is_open_inference(path):
        errors = [each["detail"] for each in problem.fields.get("errors", ())] or [problem.detail]
        document, media_type = {"error": "; ".join(errors)}, JSON
    body = orjson.dumps(document, default=_to_json, option=_OPTIONS)
    response = Response(problem.status, media_type, [body], _headers(problem))
    response.problem = problem.name
    return response


def is_open_inference(path: str) -> bool:
    """Whether errors at this path have the form of the Open Inference Protocol."""
    return path == "/v2" or path.startswith("/v2/")


def problem_document(error: Exception, path: str, request_id: str) -> dict[str, Any]:
    """The problem document of an exception: a whole response, or one result of a call on many layers."""
    problem = _problem(error, path)
    if isinstance(problem, InternalError):
        log.error("request %s failed", request_id, exc_info=error)
        problem.fields.setdefault("request_id", request_id)
    document: dict[str, Any] = {
        "type": f"/problems/{problem.name}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "instance": path,
    }
    return document | {name: value for name, value in problem.fields.items() if name not in document}


def _problem(error: Exception, path: str) -> ProblemError:
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, HTTPException) and error.status_code == NotFound.status:
        return NotFound(f"there is nothing at {shown(path)}; /docs lists what there is")
    return InternalError("something broke inside the service; its log has the cause under the request id")


def _headers(problem: ProblemError) -> list[RawHeader]:
    match problem:
        case MethodNotAllowed():
            return [(b"allow", ", ".join(problem.fields.get("expected", ())).encode())]
        case Unauthenticated():
            return [(b"www-authenticate", b"Bearer")]
        case Overloaded() | StoreUnavailable():
            return [(b"retry-after", b"%d" % max(1, math.ceil(problem.retry_after or 1)))]
        case _:
            return []


def _to_json(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)
