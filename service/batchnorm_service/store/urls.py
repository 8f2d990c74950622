"""Stores by URL, as a setting or a command line gives them.

    memory:                       in this process; nothing outlives it
    sqlite:///data/layers.db      a file, relative to the working directory: three slashes
    sqlite:////var/lib/layers.db  a file, absolute: four slashes

The slashes count as they do in SQLAlchemy, where most users know them from. A store's own `url` is always absolute,
so that a log shows which file is meant. Percent-escapes are decoded. Forms that would quietly lose data (an SQLite
database in memory) or mean something else than they seem to are refused in words.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

from batchnorm_service.store.base import Store, StoreRefusedError
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.store.sqlite import SqliteStore

_KNOWN: Final = "known are memory: and sqlite:///relative/file.db and sqlite:////absolute/file.db"


def store_from_url(url: str, *, receipt_seconds: float) -> Store:
    """Make the store that `url` names, not yet open.

    Args:
        url: `memory:` or `sqlite:///path`.
        receipt_seconds: how long a receipt counts.

    Raises:
        StoreRefusedError: with the reason in words. It quotes no more of the URL than its scheme and path: there may
            be a password in it.
    """
    scheme, colon, rest = url.partition(":")
    match scheme.lower() if colon else "":
        case "memory":
            if rest:
                raise StoreRefusedError("a memory store has no name or options: its URL is memory:")
            return MemoryStore(receipt_seconds)
        case "sqlite":
            return SqliteStore(_path(rest), receipt_seconds)
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
