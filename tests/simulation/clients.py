"""The real client over simulated connections."""

from __future__ import annotations

from typing import Any

import httpx

from batchnorm_client import AsyncClient, Retry
from simulation.network import Connections
from simulation.runtimes import ClientRuntime

RETRY = Retry(attempts=8, deadline=20.0)

_HTTP = httpx.AsyncClient(base_url="http://world", transport=httpx.MockTransport(lambda _: httpx.Response(500)))
"""For the client's address; making one takes longer than a world."""


def make_client(connections: Connections, runtime: ClientRuntime) -> AsyncClient:
    """A client."""
    client: Any = AsyncClient(http=_HTTP, retry=RETRY)
    client._connections = connections
    client._runtime = runtime
    return client  # type: ignore[no-any-return]
