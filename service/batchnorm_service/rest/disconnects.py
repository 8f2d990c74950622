"""Calls that wait for other callers: they end when their own caller hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from .bodies import ClientGoneError

T = TypeVar("T")


async def unless_gone(receive: Receive, call: Coroutine[Any, Any, T]) -> T:
    """The call's result. Its body has been read, so all that can still come from the caller is its end.

    Raises:
        ClientGoneError: the caller hung up first; the call was cancelled.
    """
    working = asyncio.ensure_future(call)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait([working, gone])


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
