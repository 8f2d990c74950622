"""Finds layers for the list: by name from the store's index, otherwise among a bounded number of names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

from batchnorm_client.wire.documents import LayerSummary
from batchnorm_client.wire.errors import Overloaded
from batchnorm_service.layers import Layers
from batchnorm_service.tokens import Grant

MAX_READ: Final = 10_000
"""Names that one request reads at most. A page never depends on how many layers there are."""

_PAGE: Final = 250
"""Names that are read at once, in about 5 ms of the event loop."""

MAX_SCANS: Final = 8
"""Searches of one process that read names or wait to do so; further ones are refused."""

Match = Literal["start", "contains"]
Sort = Literal["name", "channels", "batches", "version", "updated"]
Order = Literal["asc", "desc"]

_KEYS: Final[dict[str, Callable[[LayerSummary], Any]]] = {
    "name": lambda layer: layer.name,
    "channels": lambda layer: layer.num_features,
    "batches": lambda layer: layer.num_batches_tracked,
    "version": lambda layer: layer.version,
    "updated": lambda layer: layer.updated_at,
}


@dataclass(frozen=True, slots=True)
class Search:
    """What the list is to show.

    Attributes:
        text: that names start with, or contain.
        match: which of both.
        sort, order: of the rows.
        after: by name: only layers after this one.
        skip: by anything else: how many rows come before.
        limit: rows of a page.
    """

    text: str = ""
    match: Match = "start"
    sort: Sort = "name"
    order: Order = "asc"
    after: str = ""
    skip: int = 0
    limit: int = 50

    @property
    def by_name(self) -> bool:
        """Whether rows come in the store's order, so that pages follow each other by name."""
        return (self.sort, self.order) == ("name", "asc")

    @property
    def scans(self) -> bool:
        """Whether names are read that may not match, up to `MAX_READ`."""
        return not (self.by_name and self.match == "start")


class ScanQueue:
    """Lets one search at a time read names: of many at once, each would read in every turn of the event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._searches = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for those before; raises `Overloaded` if there are too many."""
        if self._searches >= MAX_SCANS:
            raise Overloaded(
                f"{MAX_SCANS} searches read names already; try again, or search for the beginning of a name",
                retry_after=1,
            )
        self._searches += 1
        try:
            async with self._lock:
                yield
        finally:
            self._searches -= 1


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of the list.

    Attributes:
        layers: the rows.
        next: the name after which the next page by name begins, or the search by name goes on; None if there is none.
        read: how many names were read.
        complete: False if there are more names than were read, which may match, or belong before these rows.
        total: how many of the names that were read match; None if rows are by name.
    """

    layers: list[LayerSummary]
    next: str | None
    read: int
    complete: bool
    total: int | None = None


async def find_layers(layers: Layers, grant: Grant, search: Search) -> Found:
    """The rows that the caller may see."""
    visible = grant.visible_prefix(search.text if search.match == "start" else "")
    if visible is None:
        return Found([], None, 0, complete=True, total=0)
    if search.by_name:
        return await _by_name(layers, visible, search)
    matching, read, after = await _read(layers, visible, search, after="", most=None)
    matching.sort(key=_KEYS[search.sort], reverse=search.order == "desc")
    rows = matching[search.skip : search.skip + search.limit]
    return Found(rows, after, read, complete=after is None, total=len(matching))


async def _by_name(layers: Layers, visible: str, search: Search) -> Found:
    if search.match == "start":
        page = await layers.list(visible, search.after, search.limit)
        return Found(page.layers, page.next, len(page.layers), complete=page.next is None)
    matching, read, after = await _read(layers, visible, search, after=search.after, most=search.limit)
    return Found(matching, after, read, complete=after is None)


async def _read(
    layers: Layers, visible: str, search: Search, *, after: str, most: int | None
) -> tuple[list[LayerSummary], int, str | None]:
    """Layers that match, how many names were read, and the last of them if there are more.

    Stops after `MAX_READ` names, or when `most` layers match.
    """
    found: list[LayerSummary] = []
    read, text = 0, search.text.lower() if search.match == "contains" else ""
    while True:
        page = await layers.list(visible, after, _PAGE)
        for layer in page.layers:
            read += 1
            if text in layer.name.lower():
                found.append(layer)
                if len(found) == most:
                    last = layer.name == page.layers[-1].name and page.next is None
                    return found, read, None if last else layer.name
        if page.next is None or read >= MAX_READ:
            return found, read, page.next
        after = page.next
        await asyncio.sleep(0)  # other calls go first
