"""The calls on a layer's history: kept states, rollback, pins."""

from __future__ import annotations

from functools import partial
from urllib.parse import urlencode

import orjson

from batchnorm_client.core import readers
from batchnorm_client.core.calls import JSON_BODY, if_match_header, key_header, layer_path
from batchnorm_client.core.messages import Request
from batchnorm_client.core.unknown_outcome import confirm_unpinned
from batchnorm_client.wire.documents import HistoryPage, Layer, Pin
from batchnorm_client.wire.names import check_state_name, check_tag

_PAGE = 1000


def page(name: str, limit: int | None, before: int | None) -> Request[HistoryPage]:
    """One page of the kept states, newest first."""
    query = {"limit": _PAGE if limit is None else min(limit, _PAGE)}
    query |= {} if before is None else {"before": before}
    return Request("GET", f"{layer_path(name)}/history?{urlencode(query)}", readers.history, reads=True)


def rollback(name: str, to: int | str, key: str, if_match: int | None) -> Request[Layer]:
    """Go back to a version or a tag. With the key, every repeat is safe."""
    text = str(to)
    check_state_name(text)
    return Request(
        "POST",
        f"{layer_path(name)}/rollback",
        readers.layer,
        headers=JSON_BODY | key_header(key) | if_match_header(if_match),
        pieces=[orjson.dumps({"version": int(text)} if text.isdecimal() else {"tag": text})],
    )


def pin(name: str, tag: str, version: int | None, key: str) -> Request[Pin]:
    """Keep a state under a tag. With the key, every repeat is safe."""
    document = {} if version is None else {"version": version}
    return Request(
        "PUT",
        _pin_path(name, tag),
        readers.pin,
        (200, 201),
        headers=JSON_BODY | key_header(key),
        pieces=[orjson.dumps(document)],
    )


def pins(name: str) -> Request[list[Pin]]:
    """All pins of a layer."""
    return Request("GET", f"{layer_path(name)}/pins", readers.pins, reads=True)


def unpin(name: str, tag: str) -> Request[None]:
    """Delete a pin. It is not sent again once it may have taken effect; a GET finds out whether the pin is gone."""
    path = _pin_path(name, tag)
    return Request(
        "DELETE",
        path,
        readers.nothing,
        (204,),
        repeat_if_unknown=False,
        confirm=partial(confirm_unpinned, path),
    )


def _pin_path(name: str, tag: str) -> str:
    check_tag(tag)
    return f"{layer_path(name)}/pins/{tag}"
