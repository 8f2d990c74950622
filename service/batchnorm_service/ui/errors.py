"""Pages of problems: what happened, and what helps."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

from batchnorm_client.wire.errors import ProblemError, Unauthenticated
from batchnorm_service.rest.headers import Headers
from batchnorm_service.rest.pages import prefers_html
from batchnorm_service.rest.responses import Response
from batchnorm_service.rest.target import is_page

from .rendering import HEADERS, base_of, html, render

_HELP: Final = {
    "layer-not-found": "It may have been deleted, or your token may not see it. The list has those that you can open.",
    "version-not-found": "Only some states are kept: the history says which. A pin keeps a state as long as you want.",
    "not-found": "The address may be mistyped, or from another version of the service.",
    "forbidden": "Log in with a token of a larger scope, or ask whoever runs the service for one.",
    "version-mismatch": "The layer has changed since you opened the page. Look at it again, then repeat the action.",
    "pin-exists": "Choose another tag, or delete the pin that has this one first.",
    "too-many-pins": "Delete a pin that is no longer needed first.",
    "overloaded": "The service is busy. Try again in a moment.",
    "store-unavailable": "The service cannot reach its store. A change may have been made: see the history first.",
    "internal-error": "This is a fault of the service. Its log has the cause under the request id.",
}


def error_page(problem: ProblemError, document: dict[str, Any], headers: Headers) -> Response | None:
    """A page of a problem under /ui, or a redirect to the login; None for a script, or anybody else, who takes JSON."""
    path: str = document["instance"]
    accept = headers.get(b"accept")
    if not is_page(path) or not prefers_html(accept.decode("latin-1") if accept else None):
        return None
    if isinstance(problem, Unauthenticated):
        location = f"{base_of(path)}/login?next={quote(_back(path), safe='')}"
        return Response(303, None, [], [*HEADERS, (b"location", location.encode()), (b"content-length", b"0")])
    body = render(
        "error.html",
        path,
        headers,
        None,
        guarded=False,
        problem=document,
        help=_HELP.get(problem.name, ""),
        back=_back(path) if problem.name != "layer-not-found" else "",
    )
    return html(problem.status, body)


def _back(path: str) -> str:
    """The page, below /ui, that a request belongs to: of a layer, or the list."""
    match path.split("/"):
        case ["", "ui", "layers", name, *_] if name:
            return f"/layers/{name}"
        case ["", "ui", "operations", *_]:
            return "/operations"
        case _:
            return ""
