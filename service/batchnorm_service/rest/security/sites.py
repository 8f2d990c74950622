"""Requests that a web page of another site makes a browser send.

A browser asks the service before it sends such a page's JSON or PUT (CORS), and gets no permission. It does not ask
before a POST without a body, which is enough for a reset where no token is needed.
"""

from __future__ import annotations

from typing import Final

from batchnorm_client.wire.errors import Forbidden

from ..headers import Headers

_OWN: Final = {b"same-origin", b"none"}  # "none": typed by the user


def refuse_other_sites(headers: Headers) -> None:
    """Return unless a browser says that a page of another site sends this; raises `Forbidden` if so.

    Browsers say it in Sec-Fetch-Site (W3C, Fetch Metadata); older ones say in Origin whose page it is.
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is None and origin is not None:
        own = origin.partition(b"://")[2] == headers.get(b"host")
    else:
        own = site is None or site in _OWN
    if not own:
        raise Forbidden("a web page of another site may not change layers", expected="same-origin")
