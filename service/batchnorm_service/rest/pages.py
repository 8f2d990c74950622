"""Pages for people: what this service is, what each problem type means, and the documentation of the calls."""

from __future__ import annotations

import inspect
from importlib.resources import files
from pathlib import Path
from typing import Final

import orjson
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse

from batchnorm_client.wire.errors import PROBLEMS, NotAcceptable, NotFound, ProblemError
from batchnorm_client.wire.media_types import JSON

from .headers import Headers, read_headers
from .negotiation import accepted
from .openapi import Json, describe
from .queries import NoQuery, parse_query
from .responses import RawHeader, Response, respond_json

_HTML: Final = "text/html"
_HTML_TYPE: Final = "text/html; charset=utf-8"
_SCRIPT_TYPE: Final = "text/javascript; charset=utf-8"
_VARY: Final[RawHeader] = (b"vary", b"accept")

# Swagger UI's own files come from the wheel `fastapi-offline`, so the page needs nothing from another host, and the
# policy lets it load nothing from there. Swagger UI sets style attributes; its scripts are files.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DOCS_HEADERS: Final[tuple[RawHeader, ...]] = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
)
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

_ABOUT: Final[dict[int, Json]] = {
    200: {
        "description": "Name, version and links",
        "content": {JSON: {"schema": {"type": "object", "additionalProperties": {"type": "string"}}}},
    },
    307: {"description": "To the documentation, where text/html is preferred"},
}
_TEXT = {200: {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}}
_TEXT_TYPE = "text/plain; charset=utf-8"


def add_pages(app: FastAPI) -> None:
    """The pages, as routes of `app`."""
    _add_about(app)
    _add_problem_pages(app)
    _add_documentation(app)


def _add_problem_pages(app: FastAPI) -> None:
    @app.get(
        "/problems",
        **describe("list_problems", "Every problem type", tag="problems", answers=_TEXT, guarded=False),
    )
    async def list_problems(request: Request) -> Response:
        """One line each: status, name, title."""
        parse_query(NoQuery, request.scope["query_string"])
        lines = [f"{problem.status}  {name:24}{problem.title}\n" for name, problem in PROBLEMS.items()]
        return Response(200, _TEXT_TYPE, ["".join(sorted(lines)).encode()])

    @app.get(
        "/problems/{problem}",
        **describe(
            "explain_problem",
            "What a problem type means",
            tag="problems",
            answers=_TEXT,
            problems=("not-found",),
            guarded=False,
        ),
    )
    async def explain_problem(problem: str, request: Request) -> Response:
        """The `type` of a problem document leads here."""
        parse_query(NoQuery, request.scope["query_string"])
        found = PROBLEMS.get(problem)
        if found is None:
            raise NotFound(f"there is no problem type {problem[:200]!r}; /problems lists them", expected=list(PROBLEMS))
        return Response(200, _TEXT_TYPE, [problem_page(found).encode()])


def problem_page(problem: type[ProblemError]) -> str:
    """Title, status, and the words of the class's docstring."""
    return f"{problem.title}\n{problem.name}, HTTP status {problem.status}\n\n{inspect.getdoc(problem)}\n"


def _add_about(app: FastAPI) -> None:
    @app.get(
        "/",
        **describe("about", "What this is, and where its documentation is", tag="about", answers=_ABOUT, guarded=False),
    )
    async def about(request: Request) -> Response:
        """A browser, or whoever else prefers text/html, is sent to the documentation."""
        parse_query(NoQuery, request.scope["query_string"])
        if _prefers_html(read_headers(request.scope["headers"])):
            return Response(307, None, [], [(b"location", b"docs"), _VARY, (b"content-length", b"0")])
        return respond_json(200, _about(app), [_VARY])


def _about(app: FastAPI) -> dict[str, str]:
    return {
        "name": "batchnorm-service",
        "version": app.version,
        "description": app.description,
        "docs": "/docs",
        "openapi": "/openapi.json",
        "problems": "/problems",
        "healthz": "/healthz",
        "readyz": "/readyz",
    }


def _prefers_html(headers: Headers) -> bool:
    try:
        return accepted(headers.get(b"accept"), (JSON, _HTML))[0] == _HTML
    except NotAcceptable:
        return False  # JSON says more than a 406 would


def _add_documentation(app: FastAPI) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def document(request: Request) -> Response:
        parse_query(NoQuery, request.scope["query_string"])
        return Response(200, JSON, [orjson.dumps(app.openapi())])

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        parse_query(NoQuery, request.scope["query_string"])
        return Response(200, _HTML_TYPE, [_DOCS_PAGE], _DOCS_HEADERS)

    @app.get("/docs/start.js", include_in_schema=False)
    async def start(request: Request) -> Response:
        parse_query(NoQuery, request.scope["query_string"])
        return Response(200, _SCRIPT_TYPE, [_START_SCRIPT], _DOCS_HEADERS)

    def add_file(name: str, media_type: str) -> None:
        path = Path(str(files("fastapi_offline"))) / "static" / name

        @app.get(f"/docs/{name}", include_in_schema=False)
        async def file(request: Request) -> FileResponse:
            parse_query(NoQuery, request.scope["query_string"])
            return FileResponse(path, media_type=media_type, headers=_FILE_HEADERS)

    add_file("swagger-ui-bundle.js", _SCRIPT_TYPE)
    add_file("swagger-ui.css", "text/css; charset=utf-8")
