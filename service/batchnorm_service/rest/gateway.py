"""The gateway: what holds for every request, and the table of endpoints that are called in microseconds.

Requests come by ASGI or by the fast path (`batchnorm_service.fast_path`). Both ask the same table; what is not in it
goes to FastAPI.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from batchnorm_client.wire.errors import Overloaded, ProblemError, StoreUnavailable
from batchnorm_client.wire.headers import REQUEST_ID
from batchnorm_client.wire.names import check_layer_name

from .bodies import ClientGoneError
from .headers import Headers, read_headers, request_id
from .layer_request import Endpoint, LayerRequest
from .problems import respond_problem
from .responses import JOIN_BYTES, RawHeader, Response
from .security import Guard
from .target import MOST_CACHED_BYTES, Target, read_target, target_of
from .transfers import Transfers

log = logging.getLogger(__name__)

_REQUEST_ID: Final = REQUEST_ID.lower().encode()
_CLOSE: Final = (b"connection", b"close")
_READ_A_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class Gateway:
    """The service as an ASGI application.

    Every response gets its X-Request-ID here, every call is guarded, those below /v1 are counted, layer names are
    checked before anything looks at them, and whatever nobody caught becomes a problem.

    Args:
        app: has all routes.
        endpoints: by method and the last part of `/v1/layers/{name}/...`: the calls that are made for every batch,
            and are asked without FastAPI.
        guard: who may do what.
        transfers: bounds what is buffered before and after a call runs.
        max_body_bytes: larger bodies are refused.
        max_concurrent_requests: calls beyond so many at once are refused. A call runs from the end of its body until
            its response is ready to be sent.
        fast_path: whether endpoints may be asked without ASGI.

    Attributes:
        app: the FastAPI application inside.
        transfers: as above.
        running: how many calls run now.
    """

    def __init__(
        self,
        app: FastAPI,
        endpoints: Mapping[tuple[str, str], Endpoint],
        guard: Guard,
        transfers: Transfers,
        *,
        max_body_bytes: int,
        max_concurrent_requests: int,
        fast_path: bool,
    ) -> None:
        self.app = app
        self.transfers = transfers
        self._endpoints = endpoints
        self._fast_endpoints = endpoints if fast_path else {}
        self._max_body_bytes = max_body_bytes
        self._guard = guard
        self._max_concurrent_requests = max_concurrent_requests
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request, or run the application's lifespan."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, target, method = read_headers(scope["headers"]), read_target(scope), scope["method"]
        exchange, metered = _Exchange(headers), _Metered(self, receive, send, counted=target.versioned)
        try:
            self._admit(target, headers, method)
            if method not in _READ_A_BODY:
                metered.enter()
            endpoint = self._endpoints.get((method, target.call)) if target.layer else None
            if target.layer and endpoint:
                request = LayerRequest(target.layer, scope["query_string"], headers, metered.receive)
                await exchange.send_response(await endpoint(request), metered.send)
            else:
                inner = _inner(scope, target, headers, exchange.request_id)
                await self.app(inner, metered.receive, exchange.completing(metered.send))
        except ClientGoneError:
            log.debug("request %s: the client went away", exchange.request_id)
        except asyncio.CancelledError:
            await exchange.fail(_stopping(), target, send)
            raise
        except Exception as error:
            await exchange.fail(error, target, send)
        finally:
            metered.close()
            exchange.log(method, target)

    def fast_target(self, url: bytes) -> Target | None:
        """Where a POST goes that may take the fast path: to an endpoint of a layer, without a query."""
        if len(url) > MOST_CACHED_BYTES or b"?" in url or not url.startswith(b"/v1/"):
            return None
        target = target_of(url)
        return target if target.layer and ("POST", target.call) in self._fast_endpoints else None

    def admits(self, target: Target, headers: Headers, size: int) -> bool:
        """Whether the body of such a POST may come; if not, it goes by ASGI, which says why."""
        with suppress(ProblemError):
            if size <= self._max_body_bytes:
                self._admit(target, headers, "POST")
                return True
        return False

    def enter(self) -> None:
        """Count a call as running, once its body has come. `leave` goes with it in any case.

        Raises:
            Overloaded: too many calls are running.
        """
        self.running += 1
        if self.running > self._max_concurrent_requests:
            raise self._too_many()

    def leave(self) -> None:
        """It runs no longer."""
        self.running -= 1

    async def respond(self, target: Target, request: LayerRequest) -> Response:
        """The response to a POST that `admits` let in, and whose body is here. Raises nothing."""
        name, began = request_id(request.headers), time.perf_counter()
        try:
            self.running += 1
            if self.running > self._max_concurrent_requests:
                raise self._too_many()
            response = await self._endpoints["POST", target.call](request)
        except asyncio.CancelledError:
            response = respond_problem(_stopping(), target.path, name)
        except Exception as error:
            response = respond_problem(error, target.path, name)
        finally:
            self.running -= 1
        return _completed(response, target, began, name)

    def refuse(self, problem: ProblemError, target: Target, headers: Headers) -> Response:
        """The response to a POST that `admits` let in, and that is refused before its body is complete."""
        name = request_id(headers)
        return _completed(respond_problem(problem, target.path, name), target, time.perf_counter(), name)

    def _too_many(self) -> Overloaded:
        running = self._max_concurrent_requests
        return Overloaded(f"{running} calls are running: BATCHNORM_MAX_CONCURRENT_REQUESTS", retry_after=1)

    def _admit(self, target: Target, headers: Headers, method: str) -> None:
        self._guard.check(headers, method, target)
        if target.versioned:
            self.transfers.check()
            if not target.named:
                check_layer_name(target.layer or "")


class _Metered:
    """ASGI's receive and send of one request: its call counts as running only between its body and its response.

    Before, the part of the body that has come counts as buffered; after, what of the response the server has not taken.
    """

    __slots__ = ("_buffered", "_counted", "_gateway", "_receive", "_running", "_send")

    def __init__(self, gateway: Gateway, receive: Receive, send: Send, *, counted: bool) -> None:
        self._gateway = gateway
        self._receive = receive
        self._send = send
        self._counted = counted
        self._running = False
        self._buffered = 0

    def enter(self) -> None:
        """The request has come whole.

        Raises:
            Overloaded: too many calls are running.
        """
        if self._counted and not self._running:
            self._running = True
            self._gateway.enter()

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            if message.get("more_body", False):
                size = len(message.get("body", b""))
                self._gateway.transfers.receive(size)
                self._buffered += size
            else:
                self._release(self._buffered)
                self.enter()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._leave()
            size = int(dict(message["headers"]).get(b"content-length", 0))
            if size > JOIN_BYTES:  # it may be sent in pieces, each once there is room for it
                self._buffered += size
                self._gateway.transfers.hold(size)
        await self._send(message)
        if message["type"] == "http.response.body":
            self._release(min(self._buffered, len(message["body"])))

    def close(self) -> None:
        """The request is done with, whatever came of it."""
        self._leave()

    def _leave(self) -> None:
        self._release(self._buffered)
        if self._running:
            self._running, self._counted = False, False  # not a second time
            self._gateway.leave()

    def _release(self, size: int) -> None:
        self._buffered -= size
        self._gateway.transfers.release(size)


class _Exchange:
    """A request by ASGI, and what every response to it has."""

    def __init__(self, headers: Headers) -> None:
        self.request_id = request_id(headers)
        self.status = 0
        self._began = time.perf_counter()
        self._expects = b"expect" in headers

    async def send_response(self, response: Response, send: Send) -> None:
        self._complete(response.status_code, response.raw_headers)
        await response({}, _no_receive, send)

    def completing(self, send: Send) -> Send:
        """ASGI's send for the application inside."""

        async def complete(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = list(message["headers"])
                self._complete(message["status"], message["headers"])
            await send(message)

        return complete

    async def fail(self, error: Exception, target: Target, send: Send) -> None:
        """Respond with a problem, if no response has begun."""
        if self.status == 0:
            await self.send_response(respond_problem(error, target.path, self.request_id), send)

    def log(self, method: str, target: Target) -> None:
        _log_request(method, target, self.status, self._began, self.request_id)

    def _complete(self, status: int, headers: list[RawHeader]) -> None:
        self.status = status
        headers.append((_REQUEST_ID, self.request_id.encode()))
        if self._expects and status >= 400:
            # The client may be waiting for 100 Continue and now never send its body; the next request on this
            # connection could not be told from it.
            headers.append(_CLOSE)


def _completed(response: Response, target: Target, began: float, request_id: str) -> Response:
    """The response to a POST that came by the fast path: it expects nothing, so there is less to say."""
    response.raw_headers.append((_REQUEST_ID, request_id.encode()))
    _log_request("POST", target, response.status_code, began, request_id)
    return response


def _log_request(method: str, target: Target, status: int, began: float, request_id: str) -> None:
    if log.isEnabledFor(logging.DEBUG):
        milliseconds = (time.perf_counter() - began) * 1e3
        log.debug("%s %s %d %.2f ms %s", method, target.path, status, milliseconds, request_id)


def _inner(scope: Scope, target: Target, headers: Headers, request_id: str) -> dict[str, Any]:
    """The scope for the application inside. HEAD is GET whose body the server leaves out.

    A header that came more than once is one list (RFC 9110, 5.3): FastAPI's parameters take only the first.
    """
    return {
        **scope,
        "path": target.path,
        "raw_path": target.path.encode(),
        "root_path": "",
        "headers": list(headers.items()),
        "method": "GET" if scope["method"] == "HEAD" else scope["method"],
        "state": {**scope.get("state", {}), "request_id": request_id},
    }


def _stopping() -> StoreUnavailable:
    """The server ran out of patience while it stopped. What was queued will still be committed."""
    return StoreUnavailable("the service stops; whether the call took effect is unknown")


async def _no_receive() -> Message:
    raise RuntimeError("an answer reads nothing")
