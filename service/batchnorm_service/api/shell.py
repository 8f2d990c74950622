"""The outermost layer: what holds for every request, and the short way to train and eval.

Plain ASGI, because it wraps the calls whose time is counted in microseconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from batchnorm_client.contract import REQUEST_ID
from batchnorm_client.errors import Overloaded, StoreUnavailable

from .answers import Answer
from .bodies import ClientGoneError
from .headers import Headers, read_headers, request_id
from .normalize import NormalizeCalls
from .problems import problem_answer
from .security import Guard
from .target import Target, check_layer_name, read_target

log = logging.getLogger(__name__)

_REQUEST_ID: Final = REQUEST_ID.lower().encode()
_CLOSE: Final = (b"connection", b"close")


class Shell:
    """The service as an ASGI application.

    Every answer gets its X-Request-ID here, every call below /v1 is counted and guarded, layer names are checked
    before anything looks at them, and whatever nobody caught becomes a problem.

    Args:
        app: has all routes.
        calls: train and eval.
        guard: who may do what.
        max_concurrent_requests: calls beyond so many at once are refused.

    Attributes:
        app: the FastAPI application inside.
    """

    def __init__(self, app: FastAPI, calls: NormalizeCalls, guard: Guard, max_concurrent_requests: int) -> None:
        self.app = app
        self._calls = calls.by_name
        self._guard = guard
        self._max_concurrent_requests = max_concurrent_requests
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or run the application's lifespan."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = read_headers(scope["headers"])
        exchange = _Exchange(send, headers)
        target = read_target(scope)
        self._running += target.versioned
        try:
            await self._answer(scope, receive, exchange, headers, target)
        except ClientGoneError:
            log.debug("request %s: the client went away", exchange.request_id)
        except asyncio.CancelledError:
            # The server ran out of patience while it stopped. What was queued will still be committed.
            stopping = StoreUnavailable("the service stops; whether the call took effect is unknown")
            await exchange.fail(stopping, target.path, scope)
            raise
        except Exception as error:
            await exchange.fail(error, target.path, scope)
        finally:
            self._running -= target.versioned
            exchange.log(scope["method"], target.path)

    async def _answer(
        self, scope: Scope, receive: Receive, exchange: _Exchange, headers: Headers, target: Target
    ) -> None:
        method = scope["method"]
        if target.versioned:
            self._guard.check(headers, method, target)
            if self._running > self._max_concurrent_requests:
                raise Overloaded(f"{self._max_concurrent_requests} calls are running", retry_after=1)
            if target.layer is not None:
                check_layer_name(target.layer)
                call = self._calls.get(target.call) if method == "POST" else None
                if call is not None:
                    answer = await call(target.layer, scope["query_string"], headers, receive)
                    await exchange.send_answer(answer, scope)
                    return
        # HEAD is GET whose body the server leaves out.
        inner: dict[str, Any] = {
            **scope,
            "path": target.path,
            "root_path": "",
            "method": "GET" if method == "HEAD" else method,
        }
        inner["raw_path"] = target.path.encode()
        inner["state"] = {**scope.get("state", {}), "request_id": exchange.request_id}
        await self.app(inner, receive, exchange.send)


class _Exchange:
    """The answer to one request as it is sent: with a request id, and at most once."""

    __slots__ = ("_expects", "_send", "_since", "request_id", "status")

    def __init__(self, send: Send, headers: Headers) -> None:
        self.request_id = request_id(headers)
        self.status = 0
        self._send = send
        self._since = time.perf_counter()
        self._expects = b"expect" in headers

    async def send_answer(self, answer: Answer, scope: Scope) -> None:
        self.status = answer.status_code
        self._complete(answer.raw_headers)
        await answer(scope, _no_receive, self._send)

    async def send(self, message: Message) -> None:
        """ASGI's send for the application inside."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = list(message["headers"])
            self._complete(message["headers"])
        await self._send(message)

    async def fail(self, error: Exception, path: str, scope: Scope) -> None:
        """Answer with a problem, if no answer has begun."""
        if self.status == 0:
            await self.send_answer(problem_answer(error, path, self.request_id), scope)

    def log(self, method: str, path: str) -> None:
        if log.isEnabledFor(logging.DEBUG):
            milliseconds = (time.perf_counter() - self._since) * 1e3
            log.debug("%s %s %d %.2f ms %s", method, path, self.status, milliseconds, self.request_id)

    def _complete(self, headers: list[tuple[bytes, bytes]]) -> None:
        headers.append((_REQUEST_ID, self.request_id.encode()))
        if self._expects and self.status >= 400:
            # The client may be waiting for 100 Continue and now never send its body; the next request on this
            # connection could not be told from it.
            headers.append(_CLOSE)


async def _no_receive() -> Message:
    raise RuntimeError("an answer reads nothing")
