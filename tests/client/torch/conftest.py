"""The torch modules use the synchronous client; every test has layer names of its own."""

import itertools
import re

import httpx
import pytest

from batchnorm_client import Client
from client.harness import NOW

_numbers = itertools.count()


@pytest.fixture
def client(url):
    with Client(url) as client:
        yield client


@pytest.fixture
def name(request):
    """A layer name that no other test has; also good as a prefix."""
    return re.sub(r"[^A-Za-z0-9]+", "-", request.node.name)[:100] + f".{next(_numbers)}."


@pytest.fixture
def watched(way):
    """A client whose calls are in `way.sent`."""
    http = httpx.Client(transport=httpx.MockTransport(way), base_url="http://service")
    with http, Client(http=http, retry=NOW) as client:
        yield client
