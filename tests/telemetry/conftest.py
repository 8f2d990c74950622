"""The service by both ways in, as in tests/rest."""

from rest.conftest import anyio_backend, client, serve, service, way

__all__ = ["anyio_backend", "client", "serve", "service", "way"]
