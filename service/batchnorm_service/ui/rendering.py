"""Pages from templates: escaped, with a strict Content-Security-Policy and an ETag."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request

from batchnorm_service import __version__
from batchnorm_service.rest.headers import Headers, read_headers
from batchnorm_service.rest.responses import RawHeader, Response, respond_empty
from batchnorm_service.rest.routes import DocumentRoute
from batchnorm_service.rest.security.cookies import form_token
from batchnorm_service.rest.target import PAGE
from batchnorm_service.tokens import EVERYTHING, Grant, Scope

FOLDER: Final = Path(__file__).parent

_HTML: Final = "text/html; charset=utf-8"
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?")

# Nothing inline and nothing from elsewhere. Scripts may set single styles (CSSOM), which the policy does not concern.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final[tuple[RawHeader, ...]] = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cache-control", b"private, no-cache"),
)


def page_router() -> APIRouter:
    """A router for pages, which the OpenAPI document leaves out."""
    return APIRouter(route_class=DocumentRoute, tags=["page"], include_in_schema=False)


def _thousands(number: int) -> str:
    return f"{number:,}"


def _digits(number: float | None) -> str:
    """Four significant digits, as in a table."""
    return "\N{EN DASH}" if number is None else f"{number:.4g}".replace("-", "\N{MINUS SIGN}")


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


_ENVIRONMENT: Final = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)


def _breakable(name: str) -> Markup:
    """A name or a route that may be broken after each dot, underscore, hyphen and slash."""
    return Markup("<wbr>").join(part for part in re.split(r"(?<=[._/-])", name))


_ENVIRONMENT.filters |= {"breakable": _breakable, "thousands": _thousands, "digits": _digits, "moment": _moment}


def base_of(path: str) -> str:
    """The relative reference from a path to /ui, which also holds where a proxy puts another folder before."""
    return "../" * (path.count("/") - 1) + PAGE.removeprefix("/")


def render(template: str, path: str, headers: Headers, grant: Grant | None, *, guarded: bool, **values: Any) -> bytes:
    """A page as HTML.

    Args:
        template: its file.
        path: of the request.
        headers: of the request.
        grant: what the reader may do; None if that is not known.
        guarded: whether there are tokens, and so a login.
        values: for the template.
    """
    scope = None if grant is None else grant.scope
    values = {
        "base": base_of(path),
        "path": path,
        "form_token": form_token(headers),
        "version": __version__,
        "guarded": guarded,
        "scope": None if scope is None else str(scope),
        "prefix": grant.prefix if grant else "",
        "may_train": scope is not None and scope >= Scope.TRAIN,
        "may_admin": scope is not None and scope >= Scope.ADMIN,
        **values,
    }
    return _ENVIRONMENT.get_template(template).render(values).encode()


def respond_page(request: Request, template: str, /, **values: Any) -> Response:
    """A page, or 304 if the reader has it already.

    Args:
        request: for it.
        template: its file.
        values: for the template.
    """
    headers = read_headers(request.scope["headers"])
    grant: Grant = request.state.grant or EVERYTHING
    guarded = request.app.state.options.guard.enabled
    body = render(template, request.scope["path"], headers, grant, guarded=guarded, **values)
    tag = entity_tag(body)
    if headers.get(b"if-none-match") == tag:
        return respond_empty(304, [(b"etag", tag), *HEADERS])
    return html(200, body, [(b"etag", tag)])


def html(status: int, body: bytes, headers: Iterable[RawHeader] = ()) -> Response:
    """A response with a page."""
    return Response(status, _HTML, [body], [*HEADERS, *headers])


def entity_tag(body: bytes) -> bytes:
    """The ETag of a body."""
    return b'"%b"' % hashlib.blake2b(body, digest_size=16).hexdigest().encode()


def redirect(request: Request, to: str) -> Response:
    """A redirect to a path below /ui after a form, for GET."""
    location = base_of(request.scope["path"]) + to
    return Response(303, None, [], [*HEADERS, (b"location", location.encode()), (b"content-length", b"0")])


def origin_of(request: Request) -> str:
    """The address by which the reader reached the service, for examples. Scripts correct its scheme behind a proxy."""
    host = read_headers(request.scope["headers"]).get(b"host", b"").decode("latin-1")
    return f"{request.scope.get('scheme', 'http')}://{host if _HOST.fullmatch(host) else '127.0.0.1:8000'}"
