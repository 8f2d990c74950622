"""A service inside this process, for notebooks and for other people's tests; `plugin` has fixtures for pytest."""

from .local_service import LocalService

__all__ = ["LocalService"]
