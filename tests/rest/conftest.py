"""The service over a store in memory; every test of a call runs by ASGI, and over a socket by the fast path."""

import asyncio
import contextlib

import httpx
import pytest

from batchnorm_service.app import create_app
from batchnorm_service.settings import Settings
from batchnorm_service.store.memory import MemoryStore
from fast_path.running import listening


class Socket(httpx.AsyncHTTPTransport):
    """Sends requests to a port of this machine, whatever host they name."""

    def __init__(self, port):
        super().__init__(verify=False, limits=httpx.Limits(max_connections=None))
        self.port = port

    async def handle_async_request(self, request):
        request.url = request.url.copy_with(host="127.0.0.1", port=self.port)
        return await super().handle_async_request(request)


class Service:
    """A running application with its parts; `client()` talks to it.

    Args:
        port: where it is served by the fast path; None to call it by ASGI.
    """

    def __init__(self, gateway, store, port):
        self.store = store
        self.gateway = gateway
        self.layers = gateway.app.state.layers
        self._port = port

    def client(self, app=None, **headers):
        transport = Socket(self._port) if self._port and app is None else httpx.ASGITransport(app or self.gateway)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    async def connect(self):
        """A connection, for requests that an HTTP library would not send; there is one by the fast path only."""
        return await asyncio.open_connection("127.0.0.1", self._port)


@contextlib.asynccontextmanager
async def running(way, traces=None, **settings):
    chosen, store = Settings(fast_path=way == "fast path", **settings), MemoryStore()
    gateway = create_app(chosen, store, traces=traces)
    async with gateway.app.router.lifespan_context(gateway.app):
        if chosen.fast_path:
            async with listening(gateway, chosen) as (port, _):
                yield Service(gateway, store, port)
        else:
            yield Service(gateway, store, None)


@pytest.fixture(params=["asgi", "fast path"])
def way(request):
    """How requests reach the service."""
    return request.param


by_asgi = pytest.mark.parametrize("way", ["asgi"], indirect=True)
"""For a test that calls the application itself, or looks into it, instead of sending a request."""


@pytest.fixture
def anyio_backend(way):
    """On the loop that uvicorn runs on, where its protocol is used."""
    return "asyncio", {"use_uvloop": way == "fast path"}


@pytest.fixture
def serve(way):
    """`async with serve(token="t") as service:` for tests that need settings, or traces, of their own."""
    return lambda **settings: running(way, **settings)


@pytest.fixture
async def service(serve):
    async with serve() as service:
        yield service


@pytest.fixture
async def client(service):
    async with service.client() as client:
        yield client


@pytest.fixture
async def layer(client):
    """The URL of a layer with two channels that was trained once."""
    url = "/v1/layers/layer1.0.bn1"
    (await client.put(url, json={"num_features": 2})).raise_for_status()
    (await client.post(f"{url}/train", json={"input": [[1, 2], [3, 4], [5, 9]]})).raise_for_status()
    return url
