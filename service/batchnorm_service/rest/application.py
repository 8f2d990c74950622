"""The HTTP side put together: FastAPI with every route, and the gateway around it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request

from batchnorm_client.wire.errors import MethodNotAllowed, ProblemError
from batchnorm_service import __version__
from batchnorm_service.layers import Layers

from .bodies import ClientGoneError
from .documents import invalid_request
from .gateway import Gateway
from .gradients import GradientEndpoint
from .gradients import router as gradient_routes
from .health import router as health_routes
from .layer_request import Endpoint
from .layers import read_layer
from .layers import router as layer_routes
from .moments import MomentsEndpoint
from .moments import router as moments_routes
from .normalize import NormalizeEndpoints
from .normalize import router as normalize_routes
from .openapi import openapi_document
from .pages import router as page_routes
from .problems import respond_problem
from .responses import Response, respond_empty
from .security import Guard
from .state import router as state_routes
from .transfers import Transfers

ROUTERS: Final = (
    layer_routes,
    state_routes,
    normalize_routes,
    gradient_routes,
    moments_routes,
    health_routes,
    page_routes,
)
"""Every route. A new one goes into the router of its module; a new router goes here."""

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
    return build_gateway(build_app(lifespan), layers, options)


def build_app(lifespan: Lifespan) -> FastAPI:
    """FastAPI with every route."""
    app = FastAPI(
        title="Batch normalization",
        version=__version__,
        description="Named batch-normalization layers: one place where running statistics live.",
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        exception_handlers={
            ProblemError: _answer_problem,
            HTTPException: _answer_problem,
            RequestValidationError: _answer_problem,
            ClientGoneError: _answer_nobody,
            Exception: _answer_problem,
        },
    )
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = cache(lambda: openapi_document(app))  # type: ignore[method-assign]
    return app


def build_gateway(app: FastAPI, layers: Layers, options: ApiOptions) -> Gateway:
    """The gateway around `app`, whose routes then call `layers`."""
    normalize_endpoints = NormalizeEndpoints(layers, options.max_body_bytes, options.max_elements)
    endpoints: dict[tuple[str, str], Endpoint] = {
        ("GET", ""): partial(read_layer, layers),
        ("POST", "train"): normalize_endpoints.train,
        ("POST", "eval"): normalize_endpoints.eval,
        ("POST", "inverse"): normalize_endpoints.inverse,
        ("POST", "backward"): GradientEndpoint(layers, options.max_body_bytes, options.max_elements).backward,
        ("POST", "moments"): MomentsEndpoint(layers, options.max_body_bytes).fold,
    }
    app.state.layers, app.state.options, app.state.endpoints = layers, options, endpoints
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
    elif isinstance(error, RequestValidationError):
        # What pydantic says of parameters, each with where it stands ("query", "header") before its name.
        error = invalid_request([each | {"loc": each["loc"][1:]} for each in error.errors()])
    return respond_problem(error, request.scope["path"], request.state.request_id)


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return respond_empty(400)  # the server drops it: the connection is closed


def _method_not_allowed(request: Request) -> MethodNotAllowed:
    """With the methods of every route that this path has; the router looks no further than the first."""
    path = request.scope["path"]
    methods = {
        method
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute) and route.path_regex.fullmatch(path)
        for method in route.methods or ()
    }
    if "GET" in methods:
        methods.add("HEAD")
    allowed = sorted(methods)
    return MethodNotAllowed(
        f"{path} takes {', '.join(allowed)}, not {request.method}", expected=allowed, got=request.method
    )
