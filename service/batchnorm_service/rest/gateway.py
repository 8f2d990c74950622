"""The outermost ASGI application: checks common to all requests, and dispatch to endpoints or FastAPI.

Requests arrive by ASGI or by the fast path (`batchnorm_service.fast_path`). Both look up the same table of endpoints;
requests for anything else go to FastAPI.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from fastapi import FastAPI
from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from batchnorm_client.wire.errors import ProblemError, StoreUnavailable
from batchnorm_client.wire.headers import REQUEST_ID
from batchnorm_client.wire.names import check_layer_name
from batchnorm_service.layers import CALLED_LAYER
from batchnorm_service.telemetry import Metrics
from batchnorm_service.telemetry.metrics import BUFFERED_BYTES, DISCONNECTED, OTHER, RUNNING_CALLS, STATUS_CLASSES
from batchnorm_service.tokens import Grant, Scope

from .bodies import ClientGoneError
from .connections import Connections, RequestLimits
from .headers import Headers, read_headers, request_id
from .layer_request import Endpoint, LayerRequest
from .problems import respond_problem
from .reports import RequestReports
from .responses import JOIN_BYTES, RawHeader, Response
from .security import Guard, Rules, WrongTokenError, check_layer
from .shares import REFUSAL_COST, CallShares, call_cost
from .target import MAX_CACHED_BYTES, Target, read_target, target_of
from .transfers import Transfers

log = logging.getLogger(__name__)

_REQUEST_ID: Final = REQUEST_ID.lower().encode()
_CLOSE: Final = (b"connection", b"close")
_FAST_QUERIES: Final = frozenset({b"", b"normalize=running"})
"""Query strings that the fast path passes on. A group needs ASGI, which tells when its client has disconnected."""

_METHODS_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class Gateway:
    """The service's ASGI application, wrapped around the FastAPI application.

    Sets X-Request-ID on every response, checks tokens and layer names, limits the concurrent calls below /v1, and
    turns uncaught exceptions into problem documents.

    Args:
        app: the FastAPI application with all routes.
        endpoints: by method and last segment of `/v1/layers/{name}/...`; these are called without FastAPI.
        guard: checks bearer tokens.
        rules: the scope that each call needs.
        transfers: limits the bytes buffered for requests and responses.
        connections: limits the open connections.
        limits: limits on requests without their bodies.
        max_body_bytes: larger request bodies are refused.
        max_concurrent_requests: further calls are refused while this many run; calls on one layer earlier. A call runs
            from the end of its request body until its response is ready to be sent.
        fast_path: whether endpoints may be called without ASGI.
        metrics: None if they are off.
        route_of: the template of a path that FastAPI routes.

    Attributes:
        app: the wrapped FastAPI application.
        guard, transfers, connections, limits: as above.
        reports: where every response is reported.
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
        *,
        limits: RequestLimits,
        max_body_bytes: int,
        max_concurrent_requests: int,
        fast_path: bool,
        metrics: Metrics | None = None,
        route_of: Callable[[str], str] = lambda _path: OTHER,
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
        self.reports = RequestReports(metrics, endpoints, route_of)
        self._posts = self.reports.posts
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
        accounting = _RequestAccounting(self, receive, send, target)
        context = _RequestContext(self, method, target, headers, accounting)
        try:
            try:
                grant = self._admit(target, headers, method)
            except WrongTokenError:
                context.close = not await self.guard.failures.delay(_address(scope))
                raise
            if method not in _METHODS_WITH_BODY:
                await accounting.enter()
            endpoint = self._endpoints.get((method, target.call)) if target.layer else None
            if target.layer and endpoint:
                request = LayerRequest(target.layer, scope["query_string"], headers, accounting.receive, grant=grant)
                await context.send_response(await endpoint(request), accounting.send)
            else:
                inner = _inner(scope, target, headers, context.request_id, grant)
                await self.app(inner, accounting.receive, context.completing(accounting.send, inner["state"]))
        except ClientGoneError:
            context.report(DISCONNECTED, 0)
            log.debug("request %s: the client disconnected", context.request_id)
        except asyncio.CancelledError:
            await context.fail(_stopping(), send)
            raise
        except Exception as error:
            await context.fail(error, send)
        finally:
            accounting.close()
            context.log()

    def fast_target(self, url: bytes) -> tuple[Target, bytes] | None:
        """Target and query of a POST that the fast path can serve (an endpoint of a layer, few queries), or None."""
        path, _, query = url.partition(b"?")
        if len(url) > MAX_CACHED_BYTES or query not in _FAST_QUERIES or not url.startswith(b"/v1/"):
            return None
        target = target_of(path)
        return (target, query) if target.layer and ("POST", target.call) in self._fast_endpoints else None

    def admits(self, target: Target, headers: Headers, size: int) -> bool:
        """Whether the fast path may read the body of this POST; if not, ASGI handles the request and responds why."""
        with suppress(ProblemError):
            if size <= self._max_body_bytes:
                self._admit(target, headers, "POST")
                return True
        return False

    @property
    def running(self) -> int:
        """How many calls run now."""
        return self.shares.running

    async def respond(self, target: Target, request: LayerRequest) -> Response:
        """The response to a POST of the fast path whose body was read. Problems are responses; it never raises."""
        name, began, size = request_id(request.headers), time.perf_counter(), len(request.received or b"")
        try:
            response = await self._respond(target, request, size)
        except asyncio.CancelledError:
            response = respond_problem(_stopping(), target.path, name)
        except Exception as error:
            response = respond_problem(error, target.path, name)
        return self._completed(response, target, began, name, size)

    async def _respond(self, target: Target, request: LayerRequest, size: int) -> Response:
        layer, shares, cost = target.layer, self.shares, call_cost(size)
        if (refusal := shares.enter(layer)) is not None:
            request.received, cost = None, REFUSAL_COST  # a body is not kept for a refusal
        try:
            if not shares.may_start(layer, cost):
                await shares.turn(layer, cost)
            if refusal is not None:
                raise refusal
            self.transfers.check()
            CALLED_LAYER.set(layer)
            return await self._endpoints["POST", target.call](request)
        finally:
            if refusal is None:
                shares.leave(layer)

    def refuse(self, problem: ProblemError, target: Target, headers: Headers) -> Response:
        """The response to a POST of the fast path that is refused before its body is complete."""
        name = request_id(headers)
        return self._completed(respond_problem(problem, target.path, name), target, time.perf_counter(), name, 0)

    def disconnected(self, target: Target) -> None:
        """Count a POST of the fast path whose client disconnected before its body was complete."""
        self.reports.report("POST", target, DISCONNECTED, time.perf_counter(), 0, 0)

    def _completed(self, response: Response, target: Target, began: float, request_id: str, received: int) -> Response:
        """Add the request id to a response of the fast path, whose requests have no Expect header; report it."""
        response.raw_headers.append((_REQUEST_ID, request_id.encode()))
        if (route := self._posts.get(target.call)) is not None:
            route.report(response.problem, time.perf_counter() - began, received, response.size)
        if log.isEnabledFor(logging.DEBUG):
            _log_request("POST", target, response.status_code, began, request_id)
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


class _RequestAccounting:
    """Wrapper of one request's ASGI `receive` and `send` that counts running calls and buffered bytes.

    The call counts as running from the end of the body to the start of the response. Before that, the received part of
    the body counts as buffered; afterwards, the unsent part of the response.

    Attributes:
        began: when the call started to run, or the request to arrive, by `time.perf_counter`.
        received: bytes of the body.
    """

    __slots__ = ("_buffered", "_counted", "_gateway", "_layer", "_receive", "_running", "_send", "began", "received")

    def __init__(self, gateway: Gateway, receive: Receive, send: Send, target: Target) -> None:
        self._gateway = gateway
        self._receive = receive
        self._send = send
        self._counted = target.versioned
        self._layer = target.layer
        self._running = False
        self._buffered = 0
        self.began = time.perf_counter()
        self.received = 0

    async def enter(self) -> None:
        """The request was read completely: its call starts to run, at once or when it is its layer's turn.

        Until then its body counts as buffered. Buffered bytes are checked once more, because a request may have been
        admitted before: responses that nobody reads would have no limit otherwise.

        Raises:
            Overloaded: too many calls are running.
        """
        self.began = time.perf_counter()
        if self._counted and not self._running:
            shares = self._gateway.shares
            refusal = shares.enter(self._layer)
            self._running = refusal is None
            cost = call_cost(self.received) if self._running else REFUSAL_COST
            if not shares.may_start(self._layer, cost):
                await shares.turn(self._layer, cost)
            if refusal is not None:
                raise refusal
            self._release(self._buffered)
            self._gateway.transfers.check()

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.received += size
            if message.get("more_body", False):
                self._gateway.transfers.receive(size)
                self._buffered += size
            else:
                await self.enter()
                self._release(self._buffered)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.close()
            size = int(dict(message["headers"]).get(b"content-length", 0))
            if size > JOIN_BYTES:  # sent in pieces, each of which waits for the client to read the one before
                self._buffered += size
                self._gateway.transfers.hold(size)
        await self._send(message)
        if message["type"] == "http.response.body":
            self._release(min(self._buffered, len(message["body"])))

    def close(self) -> None:
        """Undo what is still counted. May be called several times."""
        self._release(self._buffered)
        if self._running:
            self._running, self._counted = False, False
            self._gateway.shares.leave(self._layer)

    def _release(self, size: int) -> None:
        self._buffered -= size
        self._gateway.transfers.release(size)


class _RequestContext:
    """Request id, status and start time of one ASGI request; adds the headers that every response has.

    Set `close` to close the connection after the response.
    """

    def __init__(
        self, gateway: Gateway, method: str, target: Target, headers: Headers, accounting: _RequestAccounting
    ) -> None:
        self.request_id = request_id(headers)
        self.status = 0
        self.close = False
        self._reports = gateway.reports
        self._method = method
        self._target = target
        self._accounting = accounting
        self._began = time.perf_counter()
        self._expects = b"expect" in headers

    async def send_response(self, response: Response, send: Send) -> None:
        self._complete(response.status_code, response.raw_headers, response.outcome)
        await response({}, _no_receive, send)

    def completing(self, send: Send, state: Mapping[str, Any]) -> Send:
        """An ASGI `send` that adds them to the responses of the wrapped application, whose `request.state` this is."""

        async def complete(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = list(message["headers"])
                outcome = state.get("outcome") or STATUS_CLASSES[message["status"] // 100]
                self._complete(message["status"], message["headers"], outcome)
            await send(message)

        return complete

    async def fail(self, error: Exception, send: Send) -> None:
        """Respond with a problem document, unless a response has started."""
        if self.status == 0:
            await self.send_response(respond_problem(error, self._target.path, self.request_id), send)

    def log(self) -> None:
        if log.isEnabledFor(logging.DEBUG):
            _log_request(self._method, self._target, self.status, self._began, self.request_id)

    def report(self, outcome: str, sent: int) -> None:
        began, received = self._accounting.began, self._accounting.received
        self._reports.report(self._method, self._target, outcome, began, received, sent)

    def _complete(self, status: int, headers: list[RawHeader], outcome: str) -> None:
        self.status = status
        self.report(outcome, int(dict(headers).get(b"content-length", 0)))
        headers.append((_REQUEST_ID, self.request_id.encode()))
        if self.close:
            headers.append(_CLOSE)
        elif self._expects and status >= 400:
            # A client that waits for 100 Continue may now omit the body or send it: what follows on this connection
            # could be either that body or the next request.
            headers.append(_CLOSE)


def _log_request(method: str, target: Target, status: int, began: float, request_id: str) -> None:
    milliseconds = (time.perf_counter() - began) * 1e3
    log.debug("%s %s %d %.2f ms %s", method, target.path, status, milliseconds, request_id)


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


async def _no_receive() -> Message:
    raise RuntimeError("a response does not read the request")
