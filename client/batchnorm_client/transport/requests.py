"""Requests and responses of httpx: settings, headers, timeouts and bodies."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Final

import httpx
import numpy as np

from batchnorm_client.core import Attempts, Response
from batchnorm_client.options import HttpOptions
from batchnorm_client.transport.credentials import find_token, with_ssl_context
from batchnorm_client.transport.proxies import proxy_for
from batchnorm_client.wire.tensors.tensor import Buffer, byte_view

DEFAULT_URL: Final = "http://127.0.0.1:8000"
TIMEOUT: Final = httpx.Timeout(30, connect=5)
"""A train call may wait for a disk, a queue, or the computation of a large batch; httpx's default is 5 seconds."""

BLOCK: Final = 1 << 18
"""Larger bodies are sent in blocks of this size, since httpcore copies again what a socket did not accept at once:
25 MB there and back took 44 ms as one piece, 36 ms in blocks; up to 1 MB there is no measurable difference."""

_WITH_BODY: Final = ("POST", "PUT", "PATCH")
"""Methods whose requests have a Content-Length even without a body (RFC 9110, 8.6)."""


class ServiceEndpoint:
    """A service: its address, the headers of every request, and the settings of its connections.

    Args:
        base_url: by default that of the HTTP client that was passed in, if it has one; else BATCHNORM_URL; else
            http://127.0.0.1:8000.
        token: by default that of the token file, or of the environment unless an HTTP client was passed in.
        given: the HTTP client that was passed in, or None.
        options: httpx's options, for connections that are made here.
        token_file: a file that contains the token.

    Attributes:
        base: the service's URL, without a slash at its end.
        address: its scheme, host and port.
        shown: the URL without credentials.
        proxy: the proxy to use; None also with an HTTP client that was passed in, which has its own.
        options: arguments of an httpx transport.

    Raises:
        ValueError: the address is not an http or https URL, the token has characters that cannot be sent, or a
            certificate cannot be read.
        OSError: the token file cannot be read.
        TypeError: options for an HTTP client that was passed in, or unknown ones.
    """

    def __init__(
        self,
        base_url: str | None,
        token: str | None,
        given: httpx.Client | httpx.AsyncClient | None,
        options: Mapping[str, Any],
        token_file: str | os.PathLike[str] | None = None,
    ) -> None:
        if given is not None and options:
            raise TypeError(f"{', '.join(options)}: set it on the HTTP client that is passed in")
        if unknown := options.keys() - HttpOptions.__annotations__.keys():
            known = ", ".join(HttpOptions.__annotations__)
            raise TypeError(f"{', '.join(sorted(unknown))}: known are {known}; for others pass an HTTP client")
        url = _base_url(base_url, given)
        self._given = given
        self._timeout = httpx.Timeout(options.get("timeout", TIMEOUT))
        self.base = str(url).rstrip("/")
        self.address = f"{url.scheme}://{url.netloc.decode('ascii')}"
        self.shown = self.address + url.path.rstrip("/")
        self.options = with_ssl_context(
            {name: value for name, value in options.items() if name not in {"timeout", "proxy"}}
        )
        self.proxy = None
        if given is None:
            self.proxy = proxy_for(url, options.get("proxy"), options.get("trust_env", True))
            self.options["proxy"] = None if self.proxy is None else self.proxy.http
        token = find_token(token, token_file, use_environment=given is None)
        self._headers = {}
        if given is None:
            self._headers["Host"] = url.netloc.decode("ascii")
            self._headers["Accept"] = "*/*"
            self._headers["User-Agent"] = f"batchnorm-client/{version('batchnorm-service')}"
        # A compressed response would have to be decompressed into another buffer, and floats hardly compress.
        self._headers["Accept-Encoding"] = "identity"
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        if given is None and url.userinfo:  # as httpx does: it takes precedence over a token
            self._headers["Authorization"] = f"Basic {b64encode(_credentials(url)).decode('ascii')}"

    def build_request(self, attempts: Attempts[Any], more: Mapping[str, str] | None = None) -> httpx.Request:
        """A request of httpx, whose timeouts end at the deadline; `more` are headers besides those of the call.

        Raises:
            TimedOut: the deadline has passed.
        """
        remaining, request, http = attempts.remaining(), attempts.request, self._given
        size, url = request.size, _url(self.base + request.target)
        timeout = _capped(_with_longer_read(self._timeout if http is None else http.timeout, request.waits), remaining)
        headers = {**self._headers, **(more or {}), **request.headers}
        joined = b"".join(request.pieces) if size <= BLOCK else None
        blocks = None if joined is not None else _Blocks(request.pieces, attempts.remaining)
        if blocks is not None or (http is None and request.method in _WITH_BODY):
            headers["Content-Length"] = str(size)
        if http is None:  # http.build_request would merge defaults, which takes longer than all the rest
            return httpx.Request(
                request.method,
                url,
                headers=headers,
                stream=blocks or httpx.ByteStream(joined or b""),
                extensions={"timeout": timeout.as_dict()},
            )
        outgoing = http.build_request(request.method, url, content=joined or None, headers=headers, timeout=timeout)
        if blocks is not None:
            outgoing.stream = blocks
        return outgoing


@lru_cache(maxsize=1024)
def _url(text: str) -> httpx.URL:
    """Parsed once per URL, since parsing costs more than writing the request."""
    return httpx.URL(text)


class _Blocks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body in blocks, which are views of its pieces. It can be sent several times."""

    def __init__(self, pieces: Any, check: Callable[[], object]) -> None:
        self._pieces = pieces
        self._check = check

    def __iter__(self) -> Iterator[Any]:
        for piece in self._pieces:
            view = byte_view(piece)
            for start in range(0, len(view), BLOCK):
                self._check()
                yield view[start : start + BLOCK]

    async def __aiter__(self) -> AsyncIterator[Any]:
        for block in self:
            yield block


class ResponseBuffer:
    """Collects the body of a response in one writable buffer; results are views of it.

    Args:
        response: its headers give the length of the body.
        check: called for every part; raises when the deadline has passed.
    """

    def __init__(self, response: httpx.Response, check: Callable[[], object]) -> None:
        self._response = response
        self._check = check
        length = response.headers.get("content-length", "")
        # Memory pages are used only when they are filled, so a false length costs nothing.
        self._buffer = np.empty(int(length), np.uint8).data if length.isdigit() and len(length) < 13 else None
        self._filled = 0
        self._rest = bytearray()

    def add(self, part: bytes) -> None:
        """Append the next part."""
        self._check()
        end = self._filled + len(part)
        if self._buffer is not None and not self._rest and end <= len(self._buffer):
            self._buffer[self._filled : end] = part
            self._filled = end
        else:  # there was no Content-Length, or it was that of a compressed body
            self._rest += part

    def response(self) -> Response:
        """The response, once it is complete."""
        body: Buffer = self._rest
        if self._buffer is not None:
            filled = self._buffer[: self._filled]
            body = bytearray(filled) + self._rest if self._rest else filled
        # A dict, because a look-up in httpx's headers searches all of them.
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self._response.headers.raw
        }
        return Response(self._response.status_code, headers, body)


def _base_url(base_url: str | None, given: httpx.Client | httpx.AsyncClient | None) -> httpx.URL:
    if base_url is None and given is not None and given.base_url.host:
        base_url = str(given.base_url)
    if base_url is None:
        base_url = os.environ.get("BATCHNORM_URL") or DEFAULT_URL
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{base_url!r} is not a URL: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host or url.query or url.fragment:
        raise ValueError(f"{base_url!r} must be a URL such as {DEFAULT_URL}")
    return url


def _credentials(url: httpx.URL) -> bytes:
    return f"{url.username}:{url.password}".encode()


def _with_longer_read(timeout: httpx.Timeout, waits: float) -> httpx.Timeout:
    """The timeouts for a call during which the service waits on purpose."""
    limits = timeout.as_dict()
    read = limits.pop("read")
    return timeout if read is None or not waits else httpx.Timeout(**limits, read=read + waits)


def _capped(timeout: httpx.Timeout, remaining: float) -> httpx.Timeout:
    """The timeouts, none longer than the time until the deadline."""
    limits = timeout.as_dict()
    if all(limit is not None and limit <= remaining for limit in limits.values()) or remaining == float("inf"):
        return timeout
    return httpx.Timeout(
        **{name: remaining if limit is None else min(limit, remaining) for name, limit in limits.items()}
    )
