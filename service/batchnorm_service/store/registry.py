"""Creates stores from URLs.

    memory:                       in this process; lost when it ends
    sqlite:///data/layers.db      a file, relative to the working directory: three slashes
    sqlite:////var/lib/layers.db  a file, absolute: four slashes
    valkey://host:port/0          a Valkey or Redis server; redis:// is the same
    valkey+cluster://host,host    a Cluster, by some of its nodes; redis+cluster:// is the same
    valkeys://, rediss://, ...    each of the four with TLS; ?ca=/path/to/file.pem for a private CA

A Valkey URL may have a percent-encoded user and password before an @. SQLite URLs are those of SQLAlchemy. A store's
own `url` has an absolute path and no password, for logs. URLs that would silently lose data (an SQLite database in
memory) or are ambiguous are refused.
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
"""The module of each URL scheme's store, which has a function `from_url(url, options)`.

Modules are imported on demand: importing Valkey's client takes a thirtieth of the service's start.
"""

_KNOWN: Final = (
    "known are memory: and sqlite:///relative/file.db and sqlite:////absolute/file.db and valkey://host:port/0 and"
    " valkey+cluster://host:port,host:port"
)


def store_from_url(url: str, options: StoreOptions) -> Store:
    """Create the store that `url` names, without opening it.

    Args:
        url: see the module's docstring.
        options: options for all kinds of stores.

    Raises:
        StoreRefusedError: the URL or an option is invalid. The message contains no password: it quotes only the URL's
            scheme and path.
    """
    scheme, colon, _ = url.partition(":")
    if not colon:
        raise StoreRefusedError(f"a store URL starts with a scheme; {_KNOWN}")
    module = STORES.get(scheme.lower())
    if module is None:
        raise StoreRefusedError(f"no store has the URL scheme {scheme!r}; {_KNOWN}")
    store: Store = import_module(f"batchnorm_service.store.{module}").from_url(url, options)
    return store
