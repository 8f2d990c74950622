"""Stores by URL, as a setting or a command line gives them.

    memory:                       in this process; nothing outlives it
    sqlite:///data/layers.db      a file, relative to the working directory: three slashes
    sqlite:////var/lib/layers.db  a file, absolute: four slashes
    valkey://host:port/0          a Valkey or Redis server; redis:// is the same
    valkey+cluster://host,host    a Cluster, of which some nodes are named; redis+cluster:// is the same
    valkeys://, rediss://, ...    encrypted, each of the four; ?ca=/path/to/file.pem for certificates of one's own

A Valkey URL may have a user and a password before an @, percent-encoded. The slashes of an SQLite URL count as they do
in SQLAlchemy, where most users know them from; a store's own `url` is always absolute, so that a log shows which file
is meant, and has no password. Percent-escapes are decoded. Forms that would quietly lose data (an SQLite database in
memory) or mean something else than they seem to are refused in words.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

from batchnorm_service.store.base import Store, StoreRefusedError
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.store.sqlite.store import SqliteStore
from batchnorm_service.store.valkey.address import SCHEMES

_KNOWN: Final = (
    "known are memory: and sqlite:///relative/file.db and sqlite:////absolute/file.db and valkey://host:port/0 and"
    " valkey+cluster://host:port,host:port"
)


def store_from_url(
    url: str,
    *,
    receipt_seconds: float,
    exclusive: bool = True,
    connections: int = 2,
    timeout: float = 5.0,
    wait_replicas: int = 0,
    wait_timeout: float = 1.0,
) -> Store:
    """Make the store that `url` names, not yet open.

    Args:
        url: one of those above.
        receipt_seconds: how long a receipt counts.
        exclusive: no other process will open it; a SQLite file is locked then, and a Valkey server never is.
        connections: to each Valkey server.
        timeout: seconds for a round trip to a Valkey server.
        wait_replicas: how many Valkey replicas must have a change before it is acknowledged.
        wait_timeout: seconds that a call waits for them.

    Raises:
        StoreRefusedError: with the reason in words. It quotes no more of the URL than its scheme and path: there may
            be a password in it.
    """
    scheme, colon, rest = url.partition(":")
    if scheme.lower() in SCHEMES:
        # Its client takes a thirtieth of the service's start, which others need not wait for.
        from batchnorm_service.store.valkey.store import ValkeyStore  # noqa: PLC0415

        return ValkeyStore(
            url,
            receipt_seconds,
            connections=connections,
            timeout=timeout,
            wait_replicas=wait_replicas,
            wait_timeout=wait_timeout,
        )
    if wait_replicas:
        raise StoreRefusedError("only Valkey and Redis have replicas to wait for")
    match scheme.lower() if colon else "":
        case "memory":
            if not exclusive:
                raise StoreRefusedError("memory: lives in one process; several workers need sqlite: or valkey:")
            if rest:
                raise StoreRefusedError("a memory store has no name or options: its URL is memory:")
            return MemoryStore(receipt_seconds)
        case "sqlite":
            return SqliteStore(_path(rest), receipt_seconds, exclusive)
        case "":
            raise StoreRefusedError(f"a store URL starts with a scheme; {_KNOWN}")
        case _:
            raise StoreRefusedError(f"no store has the URL scheme {scheme!r}; {_KNOWN}")


def _path(rest: str) -> str:
    if not rest.startswith("///"):
        raise StoreRefusedError(
            "an SQLite URL has three slashes and a path: sqlite:///relative/file.db or sqlite:////absolute/file.db"
        )
    if "?" in rest or "#" in rest:
        raise StoreRefusedError("an SQLite URL takes no options; a ? or # in a path is written %3F or %23")
    try:
        path = unquote(rest[3:], errors="strict")
    except UnicodeDecodeError:
        path = ""
    if not path or re.search(r"%(?![0-9A-Fa-f]{2})", rest) or not path.isprintable():
        raise StoreRefusedError("an SQLite URL needs a path of printable UTF-8 after its three slashes")
    if ":memory:" in path.lower():
        raise StoreRefusedError("an SQLite database in memory keeps nothing: say memory: if that is meant, or a file")
    if path.lower().startswith("file:"):
        raise StoreRefusedError("an SQLite URL takes a path, not another URL (file:)")
    if path.startswith("~"):
        raise StoreRefusedError("~ is not expanded in an SQLite URL; write the path in full")
    if path.endswith(("/", "/.", "/..")) or path in {".", ".."}:
        raise StoreRefusedError(f"{path} is a directory; an SQLite URL names a file")
    return path
