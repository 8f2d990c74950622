"""A real service for the whole session, and clients of both kinds."""

import contextlib
import itertools

import pytest

from batchnorm_client import Client
from client.harness import NOW, Clients, Way, serving

_names = (f"layer-{number}" for number in itertools.count())


@pytest.fixture(scope="session")
def url():
    """A service that all tests share; each takes layers of its own."""
    with serving() as url:
        yield url


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("BATCHNORM_URL", "BATCHNORM_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["sync", "async"])
def connect(request):
    """`connect(url, **options)` makes a client; every test that uses it runs with both kinds."""
    with contextlib.ExitStack() as stack:
        yield Clients(request.param, stack)


@pytest.fixture
def client(connect, url):
    return connect(url)


@pytest.fixture
def other(url):
    """Somebody else, who may come in the middle of a test's calls."""
    with Client(url, retry=NOW) as client:
        yield client


@pytest.fixture
def name():
    """A name that no other test takes."""
    return next(_names)


@pytest.fixture
def layer(client, name):
    """A layer with 3 channels."""
    return client.create_layer(name, 3)


@pytest.fixture
def way(url):
    way = Way(url)
    yield way
    way.close()


@pytest.fixture
def shaky(connect, way):
    """A client on the way that loses answers."""
    return connect.over(way)
