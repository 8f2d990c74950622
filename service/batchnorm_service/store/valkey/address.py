"""Parses Valkey and Redis URLs; passwords are never shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from urllib.parse import unquote

from batchnorm_service.store.base import StoreRefusedError

SCHEMES: Final = (
    "valkey",
    "valkeys",
    "valkey+cluster",
    "valkeys+cluster",
    "redis",
    "rediss",
    "redis+cluster",
    "rediss+cluster",
)
DEFAULT_PREFIX: Final = "bn"

_PORT: Final = 6379
_HOST: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
_PREFIX: Final = re.compile(r"[A-Za-z0-9._-]{1,32}")
_FORM: Final = "valkey://host:port/0 or valkey+cluster://host:port,host:port"


class Node(NamedTuple):
    """Host and port of a server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL.

    Attributes:
        scheme: one of `SCHEMES`.
        nodes: the server; for a cluster, some of its nodes, from which the others are discovered.
        database: the database number; a cluster has only 0.
        prefix: prefix of all keys, so that several services can share a server.
        ca: a file of CA certificates to trust instead of the system's (TLS only).
        user, password: credentials, or None.
    """

    scheme: str
    nodes: tuple[Node, ...]
    database: int = 0
    prefix: str = DEFAULT_PREFIX
    ca: str | None = None
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    @property
    def cluster(self) -> bool:
        """Whether the URL names a Cluster."""
        return self.scheme.endswith("+cluster")

    @property
    def tls(self) -> bool:
        """Whether connections use TLS, with verification of the server's certificate and name."""
        return self.scheme.removesuffix("+cluster") in {"valkeys", "rediss"}

    @property
    def url(self) -> str:
        """The URL without user and password."""
        path = "" if self.cluster else f"/{self.database}"
        options = "" if self.prefix == DEFAULT_PREFIX else f"?prefix={self.prefix}"
        return f"{self.scheme}://{','.join(map(str, self.nodes))}{path}{options}"


def parse_address(url: str) -> Address:
    """Read a URL: `scheme://[user[:password]@]host[:port][,host:port ...][/database][?prefix=name&ca=file]`.

    Raises:
        StoreRefusedError: the URL is invalid. The message quotes nothing that may be part of a password.
    """
    scheme, _, rest = url.partition(":")
    scheme = scheme.lower()
    if scheme not in SCHEMES or not rest.startswith("//"):
        raise StoreRefusedError(f"a Valkey URL looks like {_FORM}")
    if "#" in rest:
        raise StoreRefusedError("a # in a password is written %23; a Valkey URL has no fragment")
    main, _, query = rest[2:].partition("?")
    authority, _, path = main.partition("/")
    if "@" in path or "@" in query or authority.count("@") > 1:
        raise StoreRefusedError("a /, ? or @ in a user or password is written %2F, %3F or %40")
    credentials, at, hosts = authority.rpartition("@")
    user, password = _credentials(credentials) if at else (None, None)
    options = _options(query)
    address = Address(
        scheme,
        tuple(_nodes(hosts)),
        _database(path),
        options.get("prefix", DEFAULT_PREFIX),
        options.get("ca"),
        user,
        password,
    )
    if address.cluster and address.database:
        raise StoreRefusedError("a cluster has only database 0")
    if not address.cluster and len(address.nodes) > 1:
        raise StoreRefusedError(f"several hosts are a cluster: {scheme}+cluster://host:port,host:port")
    if address.ca is not None and not address.tls:
        raise StoreRefusedError("ca is for encrypted connections: valkeys:// or rediss://")
    return address


def _credentials(text: str) -> tuple[str | None, str]:
    user, colon, password = text.partition(":")
    if not colon or not password:
        raise StoreRefusedError(
            "a user comes with a password: valkey://user:password@host, or valkey://:password@host for the password of"
            " the default user"
        )
    return (_decoded(user) if user else None), _decoded(password)


def _decoded(text: str) -> str:
    try:
        if not re.search(r"%(?![0-9A-Fa-f]{2})", text):
            return unquote(text, errors="strict")
    except UnicodeDecodeError:
        pass
    raise StoreRefusedError("in a Valkey URL a % is followed by two digits that spell UTF-8; % itself is written %25")


def _nodes(hosts: str) -> Iterator[Node]:
    for each in hosts.split(","):
        match = _HOST.fullmatch(each)
        port = int(match["port"] or _PORT) if match else 0
        if match is None or not 0 < port < 1 << 16:
            raise StoreRefusedError(f"a Valkey URL needs a host and perhaps a port: {_FORM}")
        yield Node(match["host"].strip("[]"), port)


def _database(path: str) -> int:
    if not re.fullmatch(r"[0-9]{0,5}", path):
        raise StoreRefusedError(f"after the host comes the number of a database, or nothing: {_FORM}")
    return int(path or 0)


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for option in query.split("&") if query else ():
        name, _, value = option.partition("=")
        if name not in {"prefix", "ca"} or name in options:
            raise StoreRefusedError("the options of a Valkey URL are prefix=name and ca=/path/to/file.pem, each once")
        options[name] = _decoded(value)
    if not _PREFIX.fullmatch(options.get("prefix", DEFAULT_PREFIX)):
        raise StoreRefusedError("a prefix has 1 to 32 letters, digits, dots, dashes and underscores")
    if not options.get("ca", "/").startswith("/"):
        raise StoreRefusedError("ca is the absolute path of a file")
    return options
