"""What the calls that read states have in common: they may wait, and what they answer is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final

from batchnorm_service.layers import Found, Layers, LayerStates, Selection

from .layer_request import LayerRequest
from .responses import RawHeader, Response

VARY: Final[list[RawHeader]] = [(b"vary", b"accept")]


async def find_states(
    layers: Layers, request: LayerRequest, selection: Selection, known: frozenset[str] | None, wait: float | None
) -> Found:
    """The states of the selected layers; with `wait`, once the caller does not know them.

    A call that waits ends when its client disconnects.
    """
    if known is None or not wait:
        return await layers.states.unless(selection, known)
    return await request.cancel_on_disconnect(layers.states.unless(selection, known, wait, request.waiting))


async def respond_once(
    layers: Layers, states: LayerStates, form: str, respond: Callable[[], Coroutine[Any, Any, Response]]
) -> Response:
    """The response with these states, encoded once for all calls that get them."""
    response: Response = await layers.states.once(states, form, respond)
    return response.copy()
