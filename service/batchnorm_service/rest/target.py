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

LAYER: Final = "/v1/layers/{name}"
MODEL: Final = "/v2/models/{name}"
MODEL_VERSION: Final = "/v2/models/{name}/versions/{version}"
"""The templates of the paths that name a layer."""

STATES: Final = "/v1/state"
MOMENTS: Final = "/v1/moments"
"""The paths of the calls on several layers."""

PAGE: Final = "/ui"
PAGE_LAYER: Final = "/ui/layers/{name}"

MAX_CACHED_BYTES: Final = 256
"""Longer paths are not cached. Paths of calls on layers are shorter: a name has at most 200 characters."""


class Target(NamedTuple):
    """A parsed request path.

    Attributes:
        path: normalized: unreserved characters unescaped, all others escaped.
        versioned: whether it is below /v1, /v2/models or /v2/repository, or a page that shows or creates layers. Such
            calls are never public, and count as running.
        layer: the name in `/v1/layers/{name}`, `/v2/models/{name}` or `/ui/layers/{name}`, or None.
        call: the path's template, such as `/v1/layers/{name}/train`, if it names a layer or is `STATES` or `MOMENTS`;
            or empty.
        named: False if `layer` is not a valid name.
        version: the version or tag in `/v2/models/{name}/versions/{version}`, or None.
    """

    path: str
    versioned: bool
    layer: str | None
    call: str
    named: bool = True
    version: str | None = None


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
        case ["", "v1" | "ui" as first, "layers", layer, *rest] if layer:
            template = LAYER if first == "v1" else PAGE_LAYER
            return Target(path, True, layer, "/".join([template, *rest]), _is_name(layer))
        case ["", "v2", "models", layer, "versions", version, *rest] if layer and version:
            return Target(path, True, layer, "/".join([MODEL_VERSION, *rest]), _is_name(layer), version)
        case ["", "v2", "models", layer, *rest] if layer:
            return Target(path, True, layer, "/".join([MODEL, *rest]), _is_name(layer))
        case ["", "v1", "state" | "moments"]:
            return Target(path, True, None, path)
        case ["", "v1", *_] | ["", "v2", "models" | "repository", *_] | ["", "ui"] | ["", "ui", "example"]:
            return Target(path, True, None, "")
        case _:
            return Target(path, False, None, "")


def is_page(path: str) -> bool:
    """Whether a path is that of a page under /ui, where the cookie of the login counts."""
    return path == PAGE or path.startswith(f"{PAGE}/")


def _is_name(layer: str) -> bool:
    return LAYER_NAME_PATTERN.fullmatch(layer) is not None
