"""Parses the path of a request: its decoded segments, and the layer that it names.

Percent-escapes are decoded per segment, before routing: `/v1/layers/a%2Fb` names the layer `a/b`, which is an invalid
name, and must not be routed like `/v1/layers/a/b`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from starlette.types import Scope

from batchnorm_client.wire.names import LAYER_NAME_PATTERN

MAX_CACHED_BYTES: Final = 256
"""Longer paths are not cached. Paths of calls on layers are shorter: a name has at most 200 characters."""


class Target(NamedTuple):
    """A parsed request path.

    Attributes:
        path: normalized: unreserved characters unescaped, all others escaped.
        versioned: whether it is below /v1. Such calls are never public, and count as running.
        layer: the name in `/v1/layers/{layer}`, or None.
        call: the segments after it, such as `train`, or empty.
        named: False if `layer` is not a valid name.
    """

    path: str
    versioned: bool
    layer: str | None
    call: str
    named: bool = True


def read_target(scope: Scope) -> Target:
    """The target of an HTTP request's scope."""
    raw = scope.get("raw_path") or quote(scope["path"]).encode()
    # The path is chosen by clients that have not been authenticated yet: the cache must be bounded in bytes.
    find = target_of if len(raw) <= MAX_CACHED_BYTES else target_of.__wrapped__
    return find(raw, scope.get("root_path", ""))


@lru_cache(maxsize=1024)
def target_of(raw: bytes, root: str = "") -> Target:
    """The target of a raw path without the prefix `root`. Cached: only for paths of up to `MAX_CACHED_BYTES`."""
    path = raw.decode("latin-1").removeprefix(root)
    segments = path.split("/")
    if "%" in path or not path.isascii():
        segments = [unquote(segment) for segment in segments]
        path = "/".join(quote(segment, safe="!$&'()*+,;=:@") for segment in segments)
    match segments:
        case ["", "v1", "layers", layer, *rest] if layer:
            return Target(path, True, layer, "/".join(rest), LAYER_NAME_PATTERN.fullmatch(layer) is not None)
        case ["", "v1", *_]:
            return Target(path, True, None, "")
        case _:
            return Target(path, False, None, "")
