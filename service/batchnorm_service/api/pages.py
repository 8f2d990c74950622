"""Pages for people: what each problem type means, and the documentation of the calls."""

from __future__ import annotations

import inspect

import orjson
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse

from batchnorm_client.contract import JSON
from batchnorm_client.errors import PROBLEMS, NotFound, ProblemError

from .answers import Answer
from .openapi import describe
from .queries import NoQuery, parse_query

_TEXT = {200: {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}}
_TEXT_TYPE = "text/plain; charset=utf-8"


def add_pages(app: FastAPI) -> None:
    """The pages, as routes of `app`."""
    _add_problem_pages(app)
    _add_documentation(app)


def _add_problem_pages(app: FastAPI) -> None:
    @app.get(
        "/problems",
        response_class=PlainTextResponse,
        **describe("list_problems", "Every problem type", tag="problems", answers=_TEXT, guarded=False),
    )
    async def list_problems(request: Request) -> Answer:
        """One line each: status, name, title."""
        parse_query(NoQuery, request.scope["query_string"])
        lines = [f"{problem.status}  {name:24}{problem.title}\n" for name, problem in PROBLEMS.items()]
        return Answer(200, _TEXT_TYPE, ["".join(sorted(lines)).encode()])

    @app.get(
        "/problems/{problem}",
        response_class=PlainTextResponse,
        **describe(
            "explain_problem",
            "What a problem type means",
            tag="problems",
            answers=_TEXT,
            problems=("not-found",),
            guarded=False,
        ),
    )
    async def explain_problem(problem: str, request: Request) -> Answer:
        """The `type` of a problem document leads here."""
        parse_query(NoQuery, request.scope["query_string"])
        found = PROBLEMS.get(problem)
        if found is None:
            raise NotFound(f"there is no problem type {problem[:200]!r}; /problems lists them", expected=list(PROBLEMS))
        return Answer(200, _TEXT_TYPE, [problem_page(found).encode()])


def problem_page(problem: type[ProblemError]) -> str:
    """Title, status, and the words of the class's docstring."""
    return f"{problem.title}\n{problem.name}, HTTP status {problem.status}\n\n{inspect.getdoc(problem)}\n"


def _add_documentation(app: FastAPI) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def document(request: Request) -> Answer:
        parse_query(NoQuery, request.scope["query_string"])
        return Answer(200, JSON, [orjson.dumps(app.openapi())])

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        # The page loads Swagger UI from a CDN; /openapi.json itself needs no network.
        parse_query(NoQuery, request.scope["query_string"])
        return get_swagger_ui_html(openapi_url="openapi.json", title=app.title)
