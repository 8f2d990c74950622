"""The target of a request: its path as segments, each decoded, and the layer that it names.

Percent-escapes are decoded here, segment by segment and before routing, because a layer's name may not contain what
they could smuggle in: `/v1/layers/a%2Fb` names the layer `a/b`, which is a bad name, not another path.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from starlette.types import Scope

from batchnorm_client.wire.names import LAYER_NAME_PATTERN

MOST_CACHED_BYTES: Final = 256
"""The path of a call on a layer is shorter: a name has at most 200 characters. Longer paths are not cached."""


class Target(NamedTuple):
    """Where a request goes.

    Attributes:
        path: in one spelling: unreserved characters are not escaped, all others are.
        versioned: it is a call of the API, below /v1, and counts as running. No such path is open to everyone.
        layer: the name in `/v1/layers/{layer}`, or None.
        named: no layer is named, or one by a name that a layer can have.
        call: what follows it, such as `train`; empty when nothing does.
    """

    path: str
    versioned: bool
    layer: str | None
    call: str
    named: bool = True


def read_target(scope: Scope) -> Target:
    """The target of an HTTP request's scope."""
    raw = scope.get("raw_path") or quote(scope["path"]).encode()
    # Whoever can connect chooses the path: what is kept of it before a token is asked for must be bounded in bytes.
    find = target_of if len(raw) <= MOST_CACHED_BYTES else target_of.__wrapped__
    return find(raw, scope.get("root_path", ""))


@lru_cache(maxsize=1024)
def target_of(raw: bytes, root: str = "") -> Target:
    """The target of a path as it came, `root` taken off. Only for paths of up to `MOST_CACHED_BYTES` bytes."""
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
