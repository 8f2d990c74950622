"""Builds the HTTP application: FastAPI with every route, wrapped by the gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Final

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from batchnorm_client.wire.errors import MethodNotAllowed, ProblemError
from batchnorm_service import __version__
from batchnorm_service.layers import Layers
from batchnorm_service.telemetry import Metrics, RequestLog, Traces
from batchnorm_service.telemetry.metrics import DISCONNECTED

from .bodies import ClientGoneError
from .connections import Connections, RequestLimits
from .documents import invalid_request
from .drift import router as drift_routes
from .gateway import Gateway
from .gradients import GradientEndpoint
from .gradients import router as gradient_routes
from .headers import read_headers
from .health import router as health_routes
from .history import router as history_routes
from .interface import Interface, RouteTable
from .layer_request import Endpoint
from .layers import read_layer
from .layers import router as layer_routes
from .metrics import MetricsReader
from .metrics import router as metrics_routes
from .moments import MomentsEndpoints
from .moments import router as moments_routes
from .normalize import NormalizeEndpoints
from .normalize import router as normalize_routes
from .openapi import openapi_document
from .pages import router as page_routes
from .problems import respond_problem
from .reports import RequestReports
from .responses import Response, respond_empty
from .security import Guard, Rules
from .state import read_state
from .state import router as state_routes
from .states import read_states, write_states
from .states import router as states_routes
from .target import LAYER, MOMENTS, STATES
from .transfers import Transfers

ROUTERS: Final = (
    layer_routes,
    state_routes,
    states_routes,
    normalize_routes,
    gradient_routes,
    moments_routes,
    history_routes,
    drift_routes,
    health_routes,
    metrics_routes,
    page_routes,
)
"""The routers of the REST interface. Add a new route to the router of its module, and a new router to this tuple.

A route without a rule (`security.needs`) that is not public is refused when the application is built.
"""

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """Limits and access control of the HTTP interface.

    Attributes:
        max_body_bytes: larger request bodies are refused.
        max_elements: batches with more elements are refused; a dimension of 0 counts as 1.
        max_concurrent_requests: further calls are refused while this many run.
        read_timeout, write_timeout: seconds allowed for receiving a request and for sending its response.
        max_buffered_bytes: new requests are refused while this many bytes of requests and responses are buffered.
        max_connections: further connections are refused, or take the place of idle ones.
        limits: limits on requests without their bodies.
        fast_path: whether endpoints may be called without ASGI.
        guard: checks bearer tokens.
        log: writes requests to the log.
        traces: None if they are off.
    """

    max_body_bytes: int = 64 << 20
    max_elements: int = 32 << 20
    max_concurrent_requests: int = 512
    read_timeout: float = 30.0
    write_timeout: float = 30.0
    max_buffered_bytes: int = 1 << 30
    max_connections: int = 10_000
    limits: RequestLimits = field(default_factory=RequestLimits)
    fast_path: bool = True
    guard: Guard = field(default_factory=Guard)
    log: RequestLog = field(default_factory=RequestLog)
    traces: Traces | None = None


def build_api(
    layers: Layers,
    options: ApiOptions,
    lifespan: Lifespan,
    metrics: Metrics | None = None,
    interfaces: Sequence[Interface] = (),
) -> Gateway:
    """The ASGI application over `layers`: the REST interface, and `interfaces` beside it."""
    return build_gateway(build_app(lifespan, interfaces), layers, options, metrics)


def build_app(lifespan: Lifespan, interfaces: Sequence[Interface] = ()) -> FastAPI:
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
        # FastAPI's own spans do not see the fast path, and have the query; `telemetry` has ours for both.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        exception_handlers={
            ProblemError: _handle_error,
            HTTPException: _handle_error,
            RequestValidationError: _handle_error,
            ClientGoneError: _handle_client_gone,
            Exception: _handle_error,
        },
    )
    routers = all_routers(interfaces)
    app.state.interfaces, app.state.route_table, app.state.rules = interfaces, RouteTable(routers), Rules(routers)
    for router in routers:
        app.include_router(router)
    app.state.error_pages = tuple(interface.error_page for interface in interfaces if interface.error_page)
    app.state.home = next((interface.home for interface in interfaces if interface.home), None)
    models = [model for interface in interfaces for model in interface.models]
    app.openapi = cache(lambda: openapi_document(app, models))  # type: ignore[method-assign]
    return app


def all_routers(interfaces: Iterable[Interface]) -> tuple[APIRouter, ...]:
    """The routers of the REST interface and of those beside it."""
    return *ROUTERS, *(router for interface in interfaces for router in interface.routers)


def build_gateway(app: FastAPI, layers: Layers, options: ApiOptions, metrics: Metrics | None = None) -> Gateway:
    """The gateway around `app`, whose routes then call `layers`, and which reports to `metrics`."""
    normalize_endpoints = NormalizeEndpoints(layers, options.max_body_bytes, options.max_elements)
    moments_endpoints = MomentsEndpoints(layers, options.max_body_bytes)
    endpoints: dict[tuple[str, str], Endpoint] = {
        ("GET", LAYER): partial(read_layer, layers),
        ("GET", f"{LAYER}/state"): partial(read_state, layers),
        ("GET", STATES): partial(read_states, layers, options.max_body_bytes),
        ("POST", f"{LAYER}/train"): normalize_endpoints.train,
        ("POST", f"{LAYER}/eval"): normalize_endpoints.eval,
        ("POST", f"{LAYER}/inverse"): normalize_endpoints.inverse,
        ("POST", f"{LAYER}/backward"): GradientEndpoint(layers, options.max_body_bytes, options.max_elements).backward,
        ("POST", f"{LAYER}/moments"): moments_endpoints.fold,
        ("POST", MOMENTS): moments_endpoints.fold_many,
        ("PUT", STATES): partial(write_states, layers, options.max_body_bytes),
    }
    for interface in app.state.interfaces:
        endpoints |= interface.endpoints(layers, options)
    table: RouteTable = app.state.route_table
    app.state.layers, app.state.options, app.state.endpoints, app.state.metrics = layers, options, endpoints, metrics
    app.state.metrics_reader = MetricsReader(metrics) if metrics else None
    transfers = Transfers(
        options.read_timeout, options.write_timeout, options.max_buffered_bytes, options.max_body_bytes
    )
    return Gateway(
        app,
        endpoints,
        options.guard,
        app.state.rules,
        transfers,
        Connections(options.max_connections),
        RequestReports(metrics, options.log, options.traces, endpoints, table.template_of),
        limits=options.limits,
        max_body_bytes=options.max_body_bytes,
        max_concurrent_requests=options.max_concurrent_requests,
        fast_path=options.fast_path,
        metrics=metrics,
        stop_waiting=layers.states.watches.stop,
        error_pages=app.state.error_pages,
    )


async def _handle_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == MethodNotAllowed.status:
        error = _method_not_allowed(request)
    elif isinstance(error, RequestValidationError):
        # The first part of pydantic's `loc` is the kind of parameter ("query", "header"); problems give the name only.
        error = invalid_request([each | {"loc": each["loc"][1:]} for each in error.errors()])
    scope, pages = request.scope, request.app.state.error_pages
    response = respond_problem(error, scope["path"], request.state.request_id, read_headers(scope["headers"]), pages)
    request.state.outcome = response.problem
    return response


async def _handle_client_gone(request: Request, _error: Exception) -> Response:
    request.state.outcome = DISCONNECTED
    return respond_empty(400)  # never sent: the connection is closed


def _method_not_allowed(request: Request) -> MethodNotAllowed:
    path = request.scope["path"]
    allowed = request.app.state.route_table.methods_of(path)
    return MethodNotAllowed(
        f"{path} takes {', '.join(allowed)}, not {request.method}", expected=allowed, got=request.method
    )
