"""Cancels a call that waits for other clients when its own client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from .bodies import ClientGoneError

T = TypeVar("T")


async def cancel_on_disconnect(receive: Receive, call: Coroutine[Any, Any, T]) -> T:
    """The result of `call`, which is cancelled if the client disconnects first.

    The body must have been read, so that the next ASGI message can only be a disconnect.

    Raises:
        ClientGoneError: the client disconnected first.
    """
    working = asyncio.ensure_future(call)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait([working, gone])


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
