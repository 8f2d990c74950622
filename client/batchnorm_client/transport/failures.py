"""Converts httpx's exceptions: which host failed, and whether the call may have taken effect."""

from __future__ import annotations

import ssl
from typing import Any, Final

import httpx

from batchnorm_client.core import Attempts
from batchnorm_client.transport.requests import ServiceEndpoint
from batchnorm_client.wire.errors import ConnectionFailed, NoAnswer, TimedOut

_NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
_PERMANENT: Final = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)


def no_response(
    error: httpx.TransportError | httpx.DecodingError, endpoint: ServiceEndpoint, attempts: Attempts[Any]
) -> NoAnswer:
    """The exception for an attempt without a response.

    Args:
        error: the exception of httpx.
        endpoint: of the service.
        attempts: those of the call.
    """
    if isinstance(error, httpx.TimeoutException):
        return _timed_out(error, endpoint, attempts)
    text = str(error) or type(error).__name__
    if not isinstance(error, _NOT_SENT + _PERMANENT):
        return ConnectionFailed(f"the connection to {_route(error, endpoint)} was cut: {text}", outcome_unknown=True)
    permanent = isinstance(error, _PERMANENT) or _caused_by(error, ssl.SSLCertVerificationError)
    if endpoint.proxy is not None and not isinstance(error, _PERMANENT):
        if isinstance(error, httpx.ProxyError):
            return ConnectionFailed(
                f"{endpoint.proxy} did not connect to {endpoint.address}: {text}", proxy=str(endpoint.proxy)
            )
        if not _caused_by(error, ssl.SSLError):  # which may be the service's, at the end of a tunnel
            return ConnectionFailed(f"cannot reach {endpoint.proxy}: {text}", proxy=str(endpoint.proxy))
    return ConnectionFailed(f"cannot reach {_route(error, endpoint)}: {text}", permanent=permanent)


def _timed_out(error: httpx.TimeoutException, endpoint: ServiceEndpoint, attempts: Attempts[Any]) -> TimedOut:
    when = "in time" if attempts.left() > 0 else f"within the deadline of {attempts.deadline:g} s"
    match error:
        case httpx.ConnectTimeout() if endpoint.proxy is not None:
            return TimedOut(f"{endpoint.proxy} did not connect {when}", proxy=str(endpoint.proxy))
        case httpx.ConnectTimeout():
            return TimedOut(f"{_route(error, endpoint)} did not connect {when}")
        case httpx.PoolTimeout():
            return TimedOut(f"no connection of the pool became free {when}")
        case httpx.ReadTimeout():
            return TimedOut(f"{_route(error, endpoint)} did not answer {when}", outcome_unknown=True)
        case _:
            return TimedOut(f"{_route(error, endpoint)} did not take the request {when}", outcome_unknown=True)


def _route(error: httpx.TransportError | httpx.DecodingError, endpoint: ServiceEndpoint) -> str:
    """The service and its proxy, for messages; of an HTTP client that was passed in, the host it was redirected to."""
    try:
        url = error.request.url
    except RuntimeError:  # a transport's errors have no request
        return endpoint.address if endpoint.proxy is None else f"{endpoint.address} through {endpoint.proxy}"
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False
