"""A span for each request, if the application traces with OpenTelemetry; without it, nothing is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from batchnorm_client.core import Attempts, Response

_LAYER = "/v1/layers/"


class ClientSpan:
    """A span of OpenTelemetry's, or none.

    Attributes:
        headers: those that make the service's spans children of this one.
        complete: whether there was a response.
    """

    def __init__(self, span: Any = None, headers: dict[str, str] | None = None) -> None:
        self._span = span
        self.headers = headers or {}
        self.complete = False

    def answered(self, response: Response) -> Response:
        """Record the status of the response; return the response."""
        self.complete = True
        if self._span is not None:
            self._span.set_attribute("http.response.status_code", response.status)
            if response.status >= 400:
                self.fail(str(response.status))
        return response

    def fail(self, error: str) -> None:
        """Record that the attempt failed."""
        self._span.set_attribute("error.type", error)
        self._span.set_status(sys.modules["opentelemetry.trace"].StatusCode.ERROR)


_NO_SPAN = ClientSpan()


@contextmanager
def client_span(attempts: Attempts[Any], address: str) -> Iterator[ClientSpan]:
    """The span of one attempt of a call; none if the application has not imported OpenTelemetry's API to set it up.

    Args:
        attempts: the call.
        address: of the service: scheme, host, port and path, without credentials.
    """
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None:
        yield _NO_SPAN
        return
    from opentelemetry import propagate  # noqa: PLC0415 - the application uses it

    request, url = attempts.request, urlsplit(address)
    path = request.target.partition("?")[0]
    attributes: dict[str, str | int] = {
        "http.request.method": request.method,
        "server.address": url.hostname or "",
        "server.port": url.port or {"https": 443}.get(url.scheme, 80),
        "url.full": address + request.target,
    }
    if attempts.tries:
        attributes["http.request.resend_count"] = attempts.tries
    tracer = trace.get_tracer("batchnorm_client")
    name = f"{request.method} {_template(path)}"
    # An exception's message may have values of tensors, so it is not recorded.
    with tracer.start_as_current_span(
        name, kind=trace.SpanKind.CLIENT, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        headers: dict[str, str] = {}
        propagate.inject(headers)
        sent, error = ClientSpan(span, headers), "TimedOut"  # by the deadline, which raises outside
        try:
            yield sent
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            if not sent.complete:
                sent.fail(error)


def _template(path: str) -> str:
    """The path without what differs from layer to layer: it names the span."""
    if not path.startswith(_LAYER):
        return path
    _, slash, rest = path.removeprefix(_LAYER).partition("/")
    call, *below = rest.split("/")
    return f"{_LAYER}{{name}}{slash}{call}" + ("/{tag}" if below else "")
