"""The outermost ASGI application: checks common to all requests, and dispatch to endpoints or FastAPI.

Requests arrive by ASGI or by the fast path (`batchnorm_service.fast_path`). Both look up the same table of endpoints;
requests for anything else go to FastAPI.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from fastapi import FastAPI
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from batchnorm_client.wire.errors import ProblemError, StoreUnavailable
from batchnorm_client.wire.headers import REQUEST_ID
from batchnorm_client.wire.names import check_layer_name
from batchnorm_service.layers import CALLED_LAYER
from batchnorm_service.telemetry import CURRENT_SPAN, Metrics, Span
from batchnorm_service.telemetry.metrics import BUFFERED_BYTES, DISCONNECTED, RUNNING_CALLS
from batchnorm_service.tokens import Grant, Scope

from .accounting import RequestAccounting
from .bodies import ClientGoneError
from .connections import Connections, RequestLimits
from .headers import Headers, read_headers, request_id
from .layer_request import Endpoint, LayerRequest
from .problems import ErrorPage, respond_problem
from .reports import RequestReports, Served
from .request_context import RequestContext
from .responses import Response
from .running_call import RunningCall
from .security import Guard, Rules, WrongTokenError, check_layer
from .shares import CallShares, call_cost
from .target import MAX_CACHED_BYTES, MOMENTS, STATES, Target, read_target, target_of
from .transfers import Transfers

_REQUEST_ID: Final = REQUEST_ID.lower().encode()
_FAST_QUERIES: Final = frozenset(
    {b"", b"statistics=true", b"normalize=running", b"normalize=running&statistics=true", b"mode=train", b"mode=eval"}
)
"""Query strings of calls that change something or have a batch, which the fast path passes on; of GET, all."""
_FAST_PATHS: Final = (b"/v1/layers/", b"/v2/models/", STATES.encode(), MOMENTS.encode())
_WAIT: Final = b"wait="
_METHODS_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class Gateway:
    """The service's ASGI application, wrapped around the FastAPI application.

    Sets X-Request-ID on every response, checks tokens and layer names, limits the concurrent calls below /v1, and
    turns uncaught exceptions into problem documents.

    Args:
        app: the FastAPI application with all routes.
        endpoints: by method and path's template (`Target.call`); these are called without FastAPI.
        guard: checks bearer tokens.
        rules: the scope that each call needs.
        transfers: limits the bytes buffered for requests and responses.
        connections: limits the open connections.
        limits: limits on requests without their bodies.
        max_body_bytes: larger request bodies are refused.
        max_concurrent_requests: further calls are refused while this many run; calls on one layer earlier. A call runs
            from the end of its request body until its response is ready to be sent.
        fast_path: whether endpoints may be called without ASGI.
        reports: where every response is reported.
        metrics: reads the running calls and buffered bytes; None if they are off.
        stop_waiting: ends the calls that wait for a change of layers.
        error_pages: make pages of problems, for people.

    Attributes:
        app: the wrapped FastAPI application.
        guard, transfers, connections, limits, reports: as above.
        shares: which calls may run now.
    """

    def __init__(
        self,
        app: FastAPI,
        endpoints: Mapping[tuple[str, str], Endpoint],
        guard: Guard,
        rules: Rules,
        transfers: Transfers,
        connections: Connections,
        reports: RequestReports,
        *,
        limits: RequestLimits,
        max_body_bytes: int,
        max_concurrent_requests: int,
        fast_path: bool,
        metrics: Metrics | None = None,
        stop_waiting: Callable[[], object] = lambda: None,
        error_pages: Sequence[ErrorPage] = (),
    ) -> None:
        self.app = app
        self.transfers = transfers
        self.connections = connections
        self.limits = limits
        self._endpoints = endpoints
        self._fast_endpoints = endpoints if fast_path else {}
        self._max_body_bytes = max_body_bytes
        self.guard = guard
        self._rules = rules
        self.shares = CallShares(max_concurrent_requests)
        self.reports = reports
        self._routes = reports.endpoints
        self._logged_from = reports.log.seconds
        self._stop_waiting = stop_waiting
        self._error_pages = error_pages
        if metrics:
            metrics.gauge(RUNNING_CALLS, lambda: self.running)
            metrics.gauge(BUFFERED_BYTES, lambda: transfers.buffered)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Respond to one request, or run the application's lifespan."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, target, method = read_headers(scope["headers"]), read_target(scope), scope["method"]
        CALLED_LAYER.set(target.layer)
        accounting = RequestAccounting(self.shares, self.transfers, receive, send, target)
        span = self.reports.begin(method, target, headers)
        context = RequestContext(self.reports, method, target, headers, accounting, span, self._error_pages)
        before = CURRENT_SPAN.set(span)
        try:
            try:
                grant = self._admit(target, headers, method)
            except WrongTokenError:
                context.close = not await self.guard.failures.delay(_address(scope))
                accounting.call.began = time.perf_counter()  # the delay is on purpose, and not the call's time
                raise
            if method not in _METHODS_WITH_BODY:
                await accounting.enter(waits=_WAIT in scope["query_string"])
            endpoint = self._endpoints.get((method, target.call)) if target.call else None
            if endpoint:
                request = LayerRequest(
                    target.layer or "",
                    scope["query_string"],
                    headers,
                    accounting.receive,
                    grant=grant,
                    version=target.version,
                    request_id=context.request_id,
                    waiting=accounting.call.waiting,
                )
                await context.send_response(await endpoint(request), accounting.send)
            else:
                inner = _inner(scope, target, headers, context.request_id, grant)
                await self.app(inner, accounting.receive, context.completing(accounting.send, inner["state"]))
        except ClientGoneError:
            context.report(DISCONNECTED, 0)
        except asyncio.CancelledError:
            await context.fail(_stopping(), send)
            raise
        except Exception as error:
            await context.fail(error, send)
        finally:
            accounting.close()
            CURRENT_SPAN.reset(before)

    def fast_target(self, method: str, url: bytes) -> tuple[Target, bytes] | None:
        """Target and query of a request that the fast path can serve (an endpoint), or None."""
        path, _, query = url.partition(b"?")
        if len(path) > MAX_CACHED_BYTES or not path.startswith(_FAST_PATHS):
            return None
        if query not in _FAST_QUERIES and (method != "GET" or b"#" in query):
            return None
        target = target_of(path)
        return (target, query) if (method, target.call) in self._fast_endpoints else None

    def admit(self, method: str, target: Target, headers: Headers, size: int) -> Grant | None:
        """What the caller of the fast path may do; None if the request is for ASGI, which responds why."""
        with suppress(ProblemError):
            if size <= self._max_body_bytes:
                return self._admit(target, headers, method)
        return None

    def stop_waiting(self) -> None:
        """The server stops: end the calls that wait for a change of layers, and let none begin."""
        self._stop_waiting()

    @property
    def running(self) -> int:
        """How many calls run now."""
        return self.shares.running

    async def respond(
        self, method: str, target: Target, request: LayerRequest, span: Span | None = None
    ) -> Response | None:
        """The response to a request of the fast path that was read; None if the client has disconnected.

        Problems are responses; it never raises.
        """
        name, size, call = (
            request_id(request.headers),
            len(request.received or b""),
            RunningCall(self.shares, target.layer),
        )
        request.request_id, request.waiting = name, call.waiting
        if span is not None:
            CURRENT_SPAN.set(span)  # in the context that this coroutine was started with
        try:
            response = await self._respond(method, target, request, call, size)
        except ClientGoneError:
            self.disconnected(method, target, request.headers, span)
            return None
        except asyncio.CancelledError:
            response = respond_problem(_stopping(), target.path, name)
        except Exception as error:
            response = respond_problem(error, target.path, name)
        finally:
            call.leave()
        return self._completed(method, response, target, request.headers, call.began, name, size, span)

    async def _respond(
        self, method: str, target: Target, request: LayerRequest, call: RunningCall, size: int
    ) -> Response:
        waits = _WAIT in request.query
        if not waits:
            call.enter()
            if call.refusal is not None:
                request.received = None  # a body is not kept for a refusal
        await call.start(call_cost(size), waits=waits)
        self.transfers.check()
        CALLED_LAYER.set(target.layer)
        return await self._endpoints[method, target.call](request)

    def refuse(
        self, method: str, problem: ProblemError, target: Target, headers: Headers, span: Span | None
    ) -> Response:
        """The response to a request of the fast path that is refused before its body is complete."""
        name = request_id(headers)
        response = respond_problem(problem, target.path, name)
        return self._completed(method, response, target, headers, time.perf_counter(), name, 0, span)

    def disconnected(self, method: str, target: Target, headers: Headers, span: Span | None) -> None:
        """Report a request of the fast path whose client disconnected before it was complete, or while it waited."""
        name = request_id(headers)
        self.reports.report(Served(method, target, headers, name, 0, DISCONNECTED, 0.0, 0, 0), span)

    def _completed(
        self,
        method: str,
        response: Response,
        target: Target,
        headers: Headers,
        began: float,
        request_id: str,
        received: int,
        span: Span | None,
    ) -> Response:
        """Add the request id to a response of the fast path, whose requests have no Expect header; report it."""
        response.raw_headers.append((_REQUEST_ID, request_id.encode()))
        seconds = time.perf_counter() - began
        status = response.status_code
        if (route := self._routes.get((method, target.call))) is not None:
            route.report(response.outcome if status >= 300 else None, seconds, received, response.size)
        if span is not None or seconds >= self._logged_from or status >= 500:
            outcome, sent = response.outcome, response.size
            served = Served(method, target, headers, request_id, status, outcome, seconds, received, sent)
            self.reports.describe(served, span)
        return response

    def _admit(self, target: Target, headers: Headers, method: str) -> Grant | None:
        grant = self.guard.authenticate(headers, target)
        if grant is not None and (grant.scope < Scope.ADMIN or grant.prefix):
            self._rules.check(grant, method, target)
        if target.versioned:
            self.transfers.check()
            if not target.named:
                check_layer_name(target.layer or "")
        if grant is not None and grant.prefix:
            check_layer(grant, method, target)
        return grant


def _address(scope: AsgiScope) -> str:
    client = scope.get("client")
    return client[0] if client else "an unknown address"


def _inner(scope: AsgiScope, target: Target, headers: Headers, request_id: str, grant: Grant | None) -> dict[str, Any]:
    """The ASGI scope for the wrapped application. HEAD becomes GET: the server drops the response's body.

    Repeated headers are joined (RFC 9110, 5.3), because FastAPI's parameters see only the first of them.
    """
    return {
        **scope,
        "path": target.path,
        "raw_path": target.path.encode(),
        "root_path": "",
        "headers": list(headers.items()),
        "method": "GET" if scope["method"] == "HEAD" else scope["method"],
        "state": {**scope.get("state", {}), "request_id": request_id, "grant": grant},
    }


def _stopping() -> StoreUnavailable:
    """The problem for a call that the shutdown timeout cancelled. Its queued updates are still committed."""
    return StoreUnavailable("the service stops; whether the call took effect is unknown")
