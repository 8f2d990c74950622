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

from importlib import import_module
from typing import Final

from batchnorm_service.store.base import Store, StoreOptions, StoreRefusedError
from batchnorm_service.store.valkey.address import SCHEMES

STORES: Final[dict[str, str]] = {
    "memory": "memory",
    "sqlite": "sqlite.store",
    **dict.fromkeys(SCHEMES, "valkey.store"),
}
"""By the scheme of a URL the module that has the store; its `from_url(url, options)` makes it, not yet open.

A module is imported when it is asked for: Valkey's client takes a thirtieth of the service's start.
"""

_KNOWN: Final = (
    "known are memory: and sqlite:///relative/file.db and sqlite:////absolute/file.db and valkey://host:port/0 and"
    " valkey+cluster://host:port,host:port"
)


def store_from_url(url: str, options: StoreOptions) -> Store:
    """Make the store that `url` names, not yet open.

    Args:
        url: one of those above.
        options: what every kind of store is told.

    Raises:
        StoreRefusedError: with the reason in words. It quotes no more of the URL than its scheme and path: there may
            be a password in it.
    """
    scheme, colon, _ = url.partition(":")
    if not colon:
        raise StoreRefusedError(f"a store URL starts with a scheme; {_KNOWN}")
    module = STORES.get(scheme.lower())
    if module is None:
        raise StoreRefusedError(f"no store has the URL scheme {scheme!r}; {_KNOWN}")
    store: Store = import_module(f"batchnorm_service.store.{module}").from_url(url, options)
    return store
