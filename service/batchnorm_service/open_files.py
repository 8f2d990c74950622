"""The limit on this process's open files, which connections count towards."""

from __future__ import annotations

import contextlib
import resource
from typing import Final

_RESERVE: Final = 512
"""Files that are no connections: the store's, libraries, and connections that are being refused."""

_FEWEST: Final = 64


def allow_open_files() -> None:
    """Raise the soft limit of open files to the hard limit: it is often 1,024, for the sake of `select`."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS refuses infinity
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def possible_connections(wanted: int) -> int:
    """How many of the wanted connections the limit of open files allows."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(soft - _RESERVE, _FEWEST))
