"""The outermost layer: what holds for every request, and the short ways to the calls that bring a batch or its moments.

Plain ASGI, and mostly not even that (`batchnorm_service.fast_path`): the time of such a call is counted in
microseconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from batchnorm_client.wire.errors import Overloaded, ProblemError, StoreUnavailable
from batchnorm_client.wire.headers import REQUEST_ID
from batchnorm_client.wire.names import check_layer_name
from batchnorm_service.layers import Waiting

from .bodies import ClientGoneError
from .headers import Headers, read_headers, request_id
from .problems import respond_problem
from .responses import JOIN_BYTES, RawHeader, Response
from .security import Guard
from .target import MOST_CACHED_BYTES, Target, read_target, target_of
from .transfers import Transfers

log = logging.getLogger(__name__)

_REQUEST_ID: Final = REQUEST_ID.lower().encode()
_CLOSE: Final = (b"connection", b"close")
_READ_A_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class ShortCalls(NamedTuple):
    """Calls of a layer that go past FastAPI's router.

    Attributes:
        by_name: the calls, each with the layer's name, the query, the headers and ASGI's receive.
        now: those that may be answered at once, with the layer's name, the headers and the body; None: not this time.
        soon: those that may wait for a commit alone, as above; with what writes the answer.
        max_body_bytes: larger bodies are refused.
    """

    by_name: Mapping[str, Callable[[str, bytes, Headers, Receive], Awaitable[Response]]]
    now: Mapping[str, Callable[[str, Headers, memoryview], Response | None]]
    soon: Mapping[str, Callable[[str, Headers, memoryview], tuple[Waiting[Any], Callable[[Any], Response]] | None]]
    max_body_bytes: int


class Gateway:
    """The service as an ASGI application.

    Every answer gets its X-Request-ID here, every call is guarded, those below /v1 are counted, layer names are
    checked before anything looks at them, and whatever nobody caught becomes a problem.

    Args:
        app: has all routes.
        calls: go the short way.
        guard: who may do what.
        max_concurrent_requests: calls beyond so many at once are refused. A call runs from the end of its body until
            its response is ready to be sent.
        transfers: bounds what is buffered before and after.

    Attributes:
        app: the FastAPI application inside.
        transfers: as above.
    """

    def __init__(
        self, app: FastAPI, calls: ShortCalls, guard: Guard, max_concurrent_requests: int, transfers: Transfers
    ) -> None:
        self.app = app
        self.transfers = transfers
        self._calls = calls
        self._guard = guard
        self._max_concurrent_requests = max_concurrent_requests
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Response one request, or run the application's lifespan."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, target, method = read_headers(scope["headers"]), read_target(scope), scope["method"]
        exchange, metered = _Exchange(headers), _Metered(self, receive, send, counted=target.versioned)
        try:
            self._admit(target, headers, method)
            if method not in _READ_A_BODY:
                metered.enter()
            call = self._calls.by_name.get(target.call) if target.layer and method == "POST" else None
            if target.layer and call:
                answer = await call(target.layer, scope["query_string"], headers, metered.receive)
                await exchange.send_answer(answer, metered.send)
            else:
                inner = _inner(scope, target, exchange.request_id)
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

    def direct_target(self, url: bytes) -> Target | None:
        """Where a POST goes that may take the direct way: to a short call, without a query."""
        if len(url) > MOST_CACHED_BYTES or b"?" in url or not url.startswith(b"/v1/"):
            return None
        target = target_of(url)
        return target if target.layer and target.call in self._calls.by_name else None

    def admits(self, target: Target, headers: Headers, size: int) -> bool:
        """Whether the body of such a POST may come; if not, it goes by ASGI, which says why."""
        with suppress(ProblemError):
            if size <= self._calls.max_body_bytes:
                self._admit(target, headers, "POST")
                return True
        return False

    def enter(self) -> bool:
        """Count a call as running, once its body has come; False when too many are. `leave` goes with it either way."""
        self._running += 1
        return self._running <= self._max_concurrent_requests

    def leave(self) -> None:
        """It runs no longer."""
        self._running -= 1

    def refuse(self, problem: ProblemError | None, target: Target, headers: Headers) -> Response:
        """The answer to a POST that is refused after its head; None says that too many calls are running."""
        exchange = _Exchange(headers)
        answer = respond_problem(problem or self.too_many(), target.path, exchange.request_id)
        return exchange.finished(answer, target)

    def too_many(self) -> Overloaded:
        """What a call is told for which `enter` was false."""
        running = self._max_concurrent_requests
        return Overloaded(f"{running} calls are running: BATCHNORM_MAX_CONCURRENT_REQUESTS", retry_after=1)

    def answer_now(self, target: Target, headers: Headers, body: memoryview) -> Response | None:
        """The answer to such a POST, if it waits for nothing; None when it does, and nothing has happened yet."""
        call = self._calls.now.get(target.call)
        if call is None:
            return None
        exchange = _Exchange(headers)
        try:
            answer = call(target.layer or "", headers, body)
        except Exception as error:
            answer = respond_problem(error, target.path, exchange.request_id)
        return None if answer is None else exchange.finished(answer, target)

    def answer_soon(self, target: Target, headers: Headers, body: memoryview) -> PendingResponse | Response | None:
        """The answer to such a POST, if it waits for a commit alone or has failed already; None as above."""
        call = self._calls.soon.get(target.call)
        if call is None:
            return None
        exchange = _Exchange(headers)
        try:
            begun = call(target.layer or "", headers, body)
        except Exception as error:
            return exchange.finished(respond_problem(error, target.path, exchange.request_id), target)
        return None if begun is None else PendingResponse(*begun, exchange, target)

    async def answer(self, target: Target, headers: Headers, body: memoryview) -> Response:
        """The same, waiting for the layer, a thread or a commit."""
        exchange = _Exchange(headers)

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            answer = await self._calls.by_name[target.call](target.layer or "", b"", headers, receive)
        except asyncio.CancelledError:
            answer = respond_problem(_stopping(), target.path, exchange.request_id)
        except Exception as error:
            answer = respond_problem(error, target.path, exchange.request_id)
        return exchange.finished(answer, target)

    def _admit(self, target: Target, headers: Headers, method: str) -> None:
        self._guard.check(headers, method, target)
        if target.versioned:
            self.transfers.check()
            if target.layer is not None:
                check_layer_name(target.layer)


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
            if not self._gateway.enter():
                raise self._gateway.too_many()

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
    """A request and what every answer to it has."""

    __slots__ = ("_expects", "_since", "request_id", "status")

    def __init__(self, headers: Headers) -> None:
        self.request_id = request_id(headers)
        self.status = 0
        self._since = time.perf_counter()
        self._expects = b"expect" in headers

    async def send_answer(self, answer: Response, send: Send) -> None:
        self._complete(answer.status_code, answer.raw_headers)
        await answer({}, _no_receive, send)

    def completing(self, send: Send) -> Send:
        """ASGI's send for the application inside."""

        async def complete(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = list(message["headers"])
                self._complete(message["status"], message["headers"])
            await send(message)

        return complete

    async def fail(self, error: Exception, target: Target, send: Send) -> None:
        """Response with a problem, if no answer has begun."""
        if self.status == 0:
            await self.send_answer(respond_problem(error, target.path, self.request_id), send)

    def finished(self, answer: Response, target: Target) -> Response:
        """The answer to a POST that nothing is left to be done for."""
        self._complete(answer.status_code, answer.raw_headers)
        self.log("POST", target)
        return answer

    def log(self, method: str, target: Target) -> None:
        if log.isEnabledFor(logging.DEBUG):
            milliseconds = (time.perf_counter() - self._since) * 1e3
            log.debug("%s %s %d %.2f ms %s", method, target.path, self.status, milliseconds, self.request_id)

    def _complete(self, status: int, headers: list[RawHeader]) -> None:
        self.status = status
        headers.append((_REQUEST_ID, self.request_id.encode()))
        if self._expects and status >= 400:
            # The client may be waiting for 100 Continue and now never send its body; the next request on this
            # connection could not be told from it.
            headers.append(_CLOSE)


class PendingResponse:
    """The answer to a call whose fold waits in the queue.

    Attributes:
        folded: done when the answer can be given. Whoever cancels it tells the caller that the service stops.
    """

    __slots__ = ("_encode", "_exchange", "_target", "_waiting", "folded")

    def __init__(
        self, waiting: Waiting[Any], encode: Callable[[Any], Response], exchange: _Exchange, target: Target
    ) -> None:
        self.folded = waiting.folded
        self._waiting = waiting
        self._encode = encode
        self._exchange = exchange
        self._target = target

    def now(self) -> Response | None:
        """The answer, once `folded` is done; None when more is to be done: `later`."""
        try:
            done = self._waiting.result()
            if done is None:
                return None
            answer = self._encode(done)
        except (asyncio.CancelledError, Exception) as error:
            answer = self._problem(error)
        return self._exchange.finished(answer, self._target)

    async def later(self) -> Response:
        """The answer, after more has been done."""
        try:
            answer = self._encode(await self._waiting.rest())
        except (asyncio.CancelledError, Exception) as error:
            answer = self._problem(error)
        return self._exchange.finished(answer, self._target)

    def _problem(self, error: BaseException) -> Response:
        said = error if isinstance(error, Exception) else _stopping()
        return respond_problem(said, self._target.path, self._exchange.request_id)


def _inner(scope: Scope, target: Target, request_id: str) -> dict[str, Any]:
    """The scope for the application inside. HEAD is GET whose body the server leaves out."""
    return {
        **scope,
        "path": target.path,
        "raw_path": target.path.encode(),
        "root_path": "",
        "method": "GET" if scope["method"] == "HEAD" else scope["method"],
        "state": {**scope.get("state", {}), "request_id": request_id},
    }


def _stopping() -> StoreUnavailable:
    """The server ran out of patience while it stopped. What was queued will still be committed."""
    return StoreUnavailable("the service stops; whether the call took effect is unknown")


async def _no_receive() -> Message:
    raise RuntimeError("an answer reads nothing")
