"""The proxy that a client uses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.request import getproxies, proxy_bypass

import httpx


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy, and where it was configured.

    Attributes:
        http: for httpx.
        source: the environment variable, or the option.
    """

    http: httpx.Proxy
    source: str

    def __str__(self) -> str:
        """For messages; without credentials."""
        url = self.http.url
        return f"the proxy {url.scheme}://{url.netloc.decode('ascii')} (from {self.source})"


def proxy_for(url: httpx.URL, given: str | httpx.URL | httpx.Proxy | None, trust_env: bool) -> Proxy | None:
    """The proxy for a service.

    Args:
        url: the service's.
        given: the option `proxy`.
        trust_env: whether to use HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, read as the standard library does.

    Raises:
        ValueError: the scheme of a proxy's URL is not http, https, socks5 or socks5h.
    """
    if given is not None:
        return Proxy(given if isinstance(given, httpx.Proxy) else httpx.Proxy(given), "the option proxy")
    if not trust_env or proxy_bypass(url.host) or proxy_bypass(url.netloc.decode("ascii")):
        return None
    named = getproxies()
    for scheme in (url.scheme, "all"):
        if address := named.get(scheme):
            names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
            source = next((name for name in names if name in os.environ), "the system's settings")
            return Proxy(httpx.Proxy(address if "://" in address else f"http://{address}"), source)
    return None
