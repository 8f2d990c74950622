"""Fixtures for pytest: `pytest_plugins = ["batchnorm_service.testing.plugin"]` in the topmost conftest.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchnorm_client import Client

from .local_service import LocalService


@pytest.fixture(scope="session")
def batchnorm_service() -> Iterator[LocalService]:
    """A service that all tests share, with its layers in memory; `batchnorm_service.url` is its address."""
    service = LocalService().start()
    yield service
    service.stop()


@pytest.fixture
def batchnorm_client(batchnorm_service: LocalService) -> Iterator[Client]:
    """A client of that service, which has no layers when the test begins: they are deleted after each test."""
    with batchnorm_service.client() as client:
        yield client
        for layer in list(client.layers()):
            client.layer(layer.name).delete(with_pins=True)
