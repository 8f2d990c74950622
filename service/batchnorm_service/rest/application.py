"""The HTTP side put together: FastAPI with every route, and the gateway around it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cache

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request

from batchnorm_client.wire.errors import MethodNotAllowed, ProblemError
from batchnorm_service import __version__
from batchnorm_service.layers import Layers

from .bodies import ClientGoneError
from .gateway import Gateway
from .gradients import add_gradient_routes
from .health import add_health_routes
from .layer_request import Endpoint
from .layers import add_layer_routes
from .moments import MomentsCalls, add_moments_routes
from .normalize import NormalizeEndpoints, add_normalize_routes
from .openapi import openapi_document
from .pages import add_pages
from .problems import respond_problem
from .responses import Response, respond_empty
from .security import Guard
from .state import add_state_routes
from .transfers import Transfers

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """What bounds and guards the HTTP side.

    Attributes:
        max_body_bytes: larger bodies are refused.
        max_elements: batches of more are refused, a dimension of 0 counted as 1.
        max_concurrent_requests: calls beyond so many at once are refused.
        read_timeout, write_timeout: seconds that a request may take to come, and its response to be taken.
        max_buffered_bytes: bytes of requests and responses on their way from which on new requests are refused.
        fast_path: whether endpoints may be asked without ASGI.
        guard: who may do what.
    """

    max_body_bytes: int = 64 << 20
    max_elements: int = 32 << 20
    max_concurrent_requests: int = 512
    read_timeout: float = 30.0
    write_timeout: float = 30.0
    max_buffered_bytes: int = 1 << 30
    fast_path: bool = True
    guard: Guard = field(default_factory=Guard)


def build_api(layers: Layers, options: ApiOptions, lifespan: Lifespan) -> Gateway:
    """The ASGI application over `layers`."""
    app = FastAPI(
        title="Batch normalization",
        version=__version__,
        description="Named batch-normalization layers: one place where running statistics live.",
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            ProblemError: _answer_problem,
            HTTPException: _answer_problem,
            ClientGoneError: _answer_nobody,
            Exception: _answer_problem,
        },
    )
    calls = NormalizeEndpoints(layers, options.max_body_bytes, options.max_elements)
    moments = MomentsCalls(layers, options.max_body_bytes)
    add_layer_routes(app, layers, options.max_body_bytes)
    add_state_routes(app, layers, options.max_body_bytes)
    add_normalize_routes(app, calls)
    add_gradient_routes(app, layers, options.max_body_bytes, options.max_elements)
    add_moments_routes(app, moments)
    add_health_routes(app, layers)
    add_pages(app)
    app.openapi = cache(lambda: openapi_document(app))  # type: ignore[method-assign]
    endpoints: dict[str, Endpoint] = {
        "train": calls.train,
        "eval": calls.eval,
        "inverse": calls.inverse,
        "moments": moments.fold,
    }
    transfers = Transfers(
        options.read_timeout, options.write_timeout, options.max_buffered_bytes, options.max_body_bytes
    )
    return Gateway(
        app,
        endpoints,
        options.guard,
        transfers,
        max_body_bytes=options.max_body_bytes,
        max_concurrent_requests=options.max_concurrent_requests,
        fast_path=options.fast_path,
    )


async def _answer_problem(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == MethodNotAllowed.status:
        error = _method_not_allowed(request)
    return respond_problem(error, request.scope["path"], request.state.request_id)


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return respond_empty(400)  # the server drops it: the connection is closed


def _method_not_allowed(request: Request) -> MethodNotAllowed:
    """With the methods of every route that this path has; the router looks no further than the first."""
    path = request.scope["path"]
    methods = {
        method
        for route in request.app.routes
        if isinstance(route, APIRoute) and route.path_regex.fullmatch(path)
        for method in route.methods or ()
    }
    if "GET" in methods:
        methods.add("HEAD")
    allowed = sorted(methods)
    return MethodNotAllowed(
        f"{path} takes {', '.join(allowed)}, not {request.method}", expected=allowed, got=request.method
    )
