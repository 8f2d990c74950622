"""Parses SQLite URLs, with the slashes of SQLAlchemy's."""

from __future__ import annotations

import re
from urllib.parse import unquote

from batchnorm_service.store.base import StoreRefusedError


def path_of(url: str) -> str:
    """The path that `sqlite:///relative.db` or `sqlite:////absolute.db` names. Raises `StoreRefusedError`."""
    rest = url.partition(":")[2]
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
