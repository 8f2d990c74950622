"""The torch modules use the synchronous client; every test has layer names of its own."""

import itertools
import re

import pytest

from batchnorm_client import Client

_numbers = itertools.count()


@pytest.fixture
def client(url):
    with Client(url) as client:
        yield client


@pytest.fixture
def name(request):
    """A layer name that no other test has; also good as a prefix."""
    return re.sub(r"[^A-Za-z0-9]+", "-", request.node.name)[:100] + f".{next(_numbers)}."
