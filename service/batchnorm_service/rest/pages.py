"""Pages for people: about the service, the problem types, and the API documentation (Swagger UI)."""

from __future__ import annotations

import inspect
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Final

from fastapi import Path as PathParameter
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse

from batchnorm_client.wire.errors import PROBLEMS, NotAcceptable, NotFound, ProblemError
from batchnorm_client.wire.media_types import JSON

from .negotiation import accepted
from .openapi import describe_responses
from .responses import RawHeader, Response, respond_json
from .routes import document_router

_HTML: Final = "text/html"
_HTML_TYPE: Final = "text/html; charset=utf-8"
_SCRIPT_TYPE: Final = "text/javascript; charset=utf-8"
_VARY: Final[RawHeader] = (b"vary", b"accept")

# Swagger UI's files are in the wheel `fastapi-offline`, so the policy can forbid loading anything from other hosts.
# Swagger UI sets style attributes (hence 'unsafe-inline'); its scripts are files.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DOCS_HEADERS: Final[tuple[RawHeader, ...]] = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
)
_SWAGGER_UI: Final = Path(str(files("fastapi_offline"))) / "static"
_FILE_HEADERS: Final = {"cache-control": "public, max-age=3600", "x-content-type-options": "nosniff"}
_DOCS_PAGE: Final = b"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Batch normalization: the calls</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript; <a href="openapi.json">openapi.json</a> says the same.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START_SCRIPT: Final = b"""SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""

router = document_router("about")


@router.get(
    "/problems",
    summary="Every problem type",
    responses=describe_responses("Text", guarded=False),
    response_class=PlainTextResponse,
)
async def list_problems() -> str:
    """One line per problem type: status, name, title."""
    return "".join(sorted(f"{problem.status}  {name:24}{problem.title}\n" for name, problem in PROBLEMS.items()))


@router.get(
    "/problems/{problem}",
    summary="What a problem type means",
    responses=describe_responses("Text", problems=("not-found",), guarded=False),
    response_class=PlainTextResponse,
)
async def explain_problem(problem: Annotated[str, PathParameter(json_schema_extra={"enum": [*PROBLEMS]})]) -> str:
    """The page that the `type` of a problem document links to."""
    if problem not in PROBLEMS:
        raise NotFound(f"there is no problem type {problem[:200]!r}; /problems lists them", expected=list(PROBLEMS))
    return problem_page(PROBLEMS[problem])


def problem_page(problem: type[ProblemError]) -> str:
    """Title, name, status, and the class's docstring, as plain text."""
    return f"{problem.title}\n{problem.name}, HTTP status {problem.status}\n\n{inspect.getdoc(problem)}\n"


@router.get(
    "/",
    summary="What this is, and where its documentation is",
    response_model=dict[str, str],
    responses=describe_responses("Name, version and links", guarded=False)
    | {307: {"description": "To the page, where text/html is preferred"}},
)
async def about(request: Request) -> Response:
    """Redirects clients that prefer text/html, such as browsers, to the page; without one, to the documentation."""
    app = request.app
    home: str | None = app.state.home
    if prefers_html(request.headers.get("accept")):
        location = (home or "docs").encode()
        return Response(307, None, [], [(b"location", location), _VARY, (b"content-length", b"0")])
    links = {name: f"/{name}" for name in (*((home,) if home else ()), "docs", "problems", "healthz", "readyz")}
    document = {"name": "batchnorm-service", "version": app.version, "description": app.description, **links}
    return respond_json(200, document | {"openapi": "/openapi.json"}, [_VARY])


def prefers_html(accept: str | None) -> bool:
    """Whether a header Accept prefers a page to JSON, as browsers' do."""
    try:
        return accepted(accept.encode("latin-1") if accept else None, (JSON, _HTML))[0] == _HTML
    except NotAcceptable:
        return False  # JSON is more helpful than 406


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    """The OpenAPI document."""
    return respond_json(200, request.app.openapi())


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """The page with Swagger UI."""
    return Response(200, _HTML_TYPE, [_DOCS_PAGE], _DOCS_HEADERS)


@router.get("/docs/start.js", include_in_schema=False)
async def start() -> Response:
    """The script that starts Swagger UI; a file, because the policy forbids inline scripts."""
    return Response(200, _SCRIPT_TYPE, [_START_SCRIPT], _DOCS_HEADERS)


@router.get("/docs/swagger-ui-bundle.js", include_in_schema=False)
async def swagger_ui_script() -> FileResponse:
    """Swagger UI's script."""
    return FileResponse(_SWAGGER_UI / "swagger-ui-bundle.js", media_type=_SCRIPT_TYPE, headers=_FILE_HEADERS)


@router.get("/docs/swagger-ui.css", include_in_schema=False)
async def swagger_ui_styles() -> FileResponse:
    """Swagger UI's style sheet."""
    return FileResponse(_SWAGGER_UI / "swagger-ui.css", media_type="text/css; charset=utf-8", headers=_FILE_HEADERS)
