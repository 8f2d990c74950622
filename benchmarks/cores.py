"""One core for the server under test, another for the load, so that neither takes time from the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
PINNED = len(ALLOWED) >= 2


def use_load_core() -> None:
    """Keep this process, and those that it starts, on the load's core."""
    if PINNED:
        os.sched_setaffinity(0, ALLOWED[-1:])


@contextmanager
def server_core() -> Iterator[None]:
    """What is started inside runs on the server's core: a child inherits where its parent may run."""
    if not PINNED:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALLOWED[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def described() -> str:
    """How the cores are used, for the head of the table."""
    if PINNED:
        return f"server on core {ALLOWED[0]}, load on core {ALLOWED[-1]}"
    return "not pinned: this needs two cores and Linux"
