"""Generated clients call a real server."""

from service.conftest import start

__all__ = ["start"]
