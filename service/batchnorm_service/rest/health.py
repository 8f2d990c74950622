"""Is the process alive, and can it work?"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request

from batchnorm_service.layers import Layers

from .openapi import describe
from .queries import NoQuery, parse_query
from .responses import Response, respond_json

_OK = {
    200: {
        "description": "Yes",
        "content": {
            "application/json": {
                "schema": {"type": "object", "properties": {"status": {"const": "ok"}}, "required": ["status"]}
            }
        },
    }
}


def add_health_routes(app: FastAPI, layers: Layers) -> None:
    """The two probes, as routes of `app`."""

    @app.get("/healthz", **describe("healthz", "The process is alive", tag="health", answers=_OK, guarded=False))
    async def healthz(request: Request) -> Response:
        """Asks nothing of the store: restarting the process would not help a store that is gone."""
        parse_query(NoQuery, request.scope["query_string"])
        return respond_json(200, {"status": "ok"})

    @app.get("/readyz", **describe("readyz", "The store can be reached", tag="health", answers=_OK, guarded=False))
    async def readyz(request: Request) -> Response:
        """503 `store-unavailable` as long as it cannot."""
        parse_query(NoQuery, request.scope["query_string"])
        await layers.ping()
        return respond_json(200, {"status": "ok"})
