"""The README is tried against a real server."""

from service.conftest import start

__all__ = ["start"]
