"""Calls whose response was lost: how to find out whether they took effect.

Each function is a `Request.confirm`: it is called after an error, if an earlier attempt may have taken effect, and
returns the request that finds out, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from batchnorm_client.core import readers
from batchnorm_client.core.messages import Request, Response
from batchnorm_client.core.problems import error_of
from batchnorm_client.wire.documents import Layer
from batchnorm_client.wire.errors import BatchNormError, LayerNotFound, VersionMismatch, VersionNotFound
from batchnorm_client.wire.tensors import Tensor, widened

_PARAMETERS = ("weight", "bias")


def confirm_deleted(path: str, if_match: int | None, error: BatchNormError) -> Request[None] | None:
    """DELETE: a layer that is gone was deleted.

    With If-Match the call is repeated, and only "no such layer" is checked: a layer that has the name by now is
    another one, because no version is used twice. Without If-Match, a GET replaces the repeat.
    """
    if if_match is not None and not isinstance(error, LayerNotFound):
        return None
    note = "the layer is still there, or there again; repeat with if_match=<its version> to delete it"
    return _gone(path, error, note if if_match is None else None)


def confirm_unpinned(path: str, error: BatchNormError) -> Request[None]:
    """DELETE of a pin: one that is gone was deleted. A repeat might delete another pin that got the tag meanwhile."""
    return _gone(path, error, "the pin is still there, or there again")


def _gone(path: str, error: BatchNormError, note_if_there: str | None) -> Request[None]:
    """A GET that succeeds if it finds nothing; or whatever it finds, without `note_if_there`."""

    def read(response: Response) -> None:
        if response.status == 404:
            found = error_of(response)
            if not isinstance(found, LayerNotFound | VersionNotFound):
                raise found
        elif note_if_there is not None:
            error.add_note(note_if_there)
            raise error

    return Request("GET", path, read, (200, 404), reads=True)


def confirm_updated(path: str, asked: Mapping[str, Any], if_match: int, error: BatchNormError) -> Request[Layer] | None:
    """PATCH with If-Match: it was refused because of its own first attempt, if the only commit since has its values."""

    def matches(layer: Layer) -> bool:
        return all(
            _same(value, getattr(layer, name), layer) if name in _PARAMETERS else value == getattr(layer.config, name)
            for name, value in asked.items()
        )

    return _read_again(path, if_match, error, matches)


def confirm_replaced(
    path: str, asked: Mapping[str, Tensor], if_match: int, error: BatchNormError
) -> Request[Layer] | None:
    """PUT state with If-Match: the same, comparing the tensors that a `Layer` document contains."""

    def matches(layer: Layer) -> bool:
        return all(_same(tensor, getattr(layer, name), layer) for name, tensor in asked.items() if hasattr(layer, name))

    return _read_again(path, if_match, error, matches)


def _read_again(
    path: str, if_match: int, error: BatchNormError, matches: Callable[[Layer], bool]
) -> Request[Layer] | None:
    if not isinstance(error, VersionMismatch):
        return None

    def read(response: Response) -> Layer:
        layer = readers.layer(response)
        if layer.version == if_match + 1 and matches(layer):
            return layer
        raise error

    return Request("GET", path, read, reads=True)


def _same(asked: Tensor, now: list[Any] | int | None, layer: Layer) -> bool:
    """Whether numbers are equal in the layer's dtype; the layer's non-finite ones may be strings."""
    if now is None or isinstance(now, int):
        return now is not None and bool(widened(asked) == now)
    with np.errstate(over="ignore"):
        # Via float64: the document has the shortest text that reads back as the float32.
        left, right = (np.asarray(one, np.float64).astype(layer.config.dtype) for one in (widened(asked), now))
    return np.array_equal(left, right, equal_nan=True)
