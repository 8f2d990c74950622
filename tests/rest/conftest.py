"""The service over a store in memory, and a client that calls it without a socket."""

import contextlib

import httpx
import pytest

from batchnorm_service.app import create_app
from batchnorm_service.settings import Settings
from batchnorm_service.store.memory import MemoryStore


class Service:
    """A running application with its parts; `client()` talks to it."""

    def __init__(self, **settings):
        self.store = MemoryStore()
        self.gateway = create_app(Settings(**settings), self.store)
        self.layers = self.gateway.app.state.layers

    def client(self, app=None, **headers):
        transport = httpx.ASGITransport(app or self.gateway)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


@contextlib.asynccontextmanager
async def running(**settings):
    service = Service(**settings)
    async with service.gateway.app.router.lifespan_context(service.gateway.app):
        yield service


@pytest.fixture
def serve():
    """`async with serve(token="t") as service:` for tests that need settings of their own."""
    return running


@pytest.fixture
async def service():
    async with running() as service:
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
