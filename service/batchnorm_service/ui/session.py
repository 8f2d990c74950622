"""Login and logout."""

from __future__ import annotations

import hmac
import re
from http import HTTPStatus
from typing import Annotated, Final
from urllib.parse import parse_qsl

from fastapi import Depends, Query
from starlette.requests import Request

from batchnorm_client.wire.errors import Forbidden, InvalidRequest, Unauthenticated
from batchnorm_service.rest.bodies import read_body
from batchnorm_service.rest.headers import read_headers
from batchnorm_service.rest.negotiation import content_type
from batchnorm_service.rest.responses import Response
from batchnorm_service.rest.routes import READ
from batchnorm_service.rest.security import Guard, WrongTokenError
from batchnorm_service.rest.security.cookies import MAX_TOKEN, clear_cookie, form_token, set_cookie

from .rendering import html, page_router, redirect, render

_FORM: Final = "application/x-www-form-urlencoded"
_MAX_FORM_BYTES: Final = 16 << 10
_NEXT: Final = re.compile(r"(/(?!\.{1,2}(?![^/?]))[A-Za-z0-9._~-]+)*(\?[A-Za-z0-9._~&=%+-]*)?")
"""Where a login may lead: below /ui, and so nowhere else. A browser would go up at a segment of two dots."""

router = page_router()


async def _read_fields(request: Request) -> dict[str, str]:
    headers = read_headers(request.scope["headers"])
    content_type(headers, (_FORM,))
    body = bytes(await read_body(headers, request.receive, _MAX_FORM_BYTES))
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, strict_parsing=bool(body), errors="strict")
    except ValueError:
        raise InvalidRequest("the form cannot be read", field="body", expected=_FORM) from None
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise InvalidRequest("a field of the form is given more than once", field="body", expected=_FORM)
    return fields


async def _read_form(request: Request) -> dict[str, str]:
    fields = await _read_fields(request)
    check_form_token(request, fields.pop("form_token", ""))
    return fields


def check_form_token(request: Request, given: str) -> None:
    """Return if a request that changes something comes from a page of this login; raises `Forbidden` if not."""
    expected = form_token(read_headers(request.scope["headers"]))
    if not hmac.compare_digest(given.encode(), expected.encode()):
        raise Forbidden("the form is not of this login; load the page again", field="form_token")


Form = Annotated[dict[str, str], Depends(_read_form)]
"""The fields of a form of a page. Sent by another site, or without the page's `form_token`, it is refused."""

Next = Annotated[str, Query(max_length=2000)]


@router.get("/ui/login")
async def login_page(request: Request, next: Next = "") -> Response:  # noqa: A002 - a query parameter
    """Asks for a token."""
    return _respond(request, HTTPStatus.OK, next, "")


@router.post("/ui/login")
async def login(request: Request) -> Response:
    """Keeps a valid token in a cookie. A wrong one is answered late, as everywhere."""
    fields = await _read_fields(request)
    guard: Guard = request.app.state.options.guard
    token, to = fields.get("token", "").strip().encode(), fields.get("next", "")
    if len(token) > MAX_TOKEN:
        problem = f"The token is longer than the {MAX_TOKEN} bytes that a browser can keep; take one of a token file."
        return _respond(request, HTTPStatus.UNPROCESSABLE_ENTITY, to, problem)
    try:
        guard.grant(b"Bearer " + token)
    except WrongTokenError:
        client = request.client
        await guard.failures.delay(client.host if client else "an unknown address")
        return _respond(request, HTTPStatus.UNAUTHORIZED, to, "The service does not know this token.")
    except Unauthenticated:
        return _respond(request, HTTPStatus.UNPROCESSABLE_ENTITY, to, "Enter a token.")
    response = redirect(request, to if _NEXT.fullmatch(to) else "")
    origin = read_headers(request.scope["headers"]).get(b"origin", b"")
    secure = request.url.scheme == "https" or origin.startswith(b"https://")  # a proxy may have ended TLS
    response.raw_headers.append((b"set-cookie", set_cookie(token, secure=secure)))
    return response


@router.post("/ui/logout", dependencies=[READ])
async def logout(request: Request, form: Form) -> Response:
    """Forgets the token."""
    response = redirect(request, "/login")
    response.raw_headers.append((b"set-cookie", clear_cookie()))
    return response


def _respond(request: Request, status: HTTPStatus, to: str, problem: str) -> Response:
    headers = read_headers(request.scope["headers"])
    guarded = request.app.state.options.guard.enabled
    body = render("login.html", "/ui/login", headers, None, guarded=guarded, next=to, problem=problem)
    return html(status, body)
