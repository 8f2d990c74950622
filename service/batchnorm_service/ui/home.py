"""The list of layers, and the first visit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import Query
from starlette.requests import Request

from batchnorm_service.layers import Layers
from batchnorm_service.rest.responses import Response
from batchnorm_service.rest.routes import READ, TRAIN, GrantDependency, LayersDependency
from batchnorm_service.tokens import Grant

from .drift import drift_of
from .example import load_example
from .rendering import origin_of, page_router, redirect, respond_page
from .search import Found, Match, Order, ScanQueue, Search, Sort, find_layers
from .session import Form

_SHORT_NAMES: Final = {"text": "q"}
_DEFAULTS: Final = asdict(Search())

_DONE: Final = {"example": "The example is loaded: open a layer to see its statistics."}

router = page_router()

Text = Annotated[str, Query(max_length=200)]


@router.get("/ui", dependencies=[READ])
async def layers_page(
    request: Request,
    layers: LayersDependency,
    grant: GrantDependency,
    q: Text = "",
    match: Match = "start",
    sort: Sort = "name",
    order: Order = "asc",
    after: Text = "",
    skip: Annotated[int, Query(ge=0, le=10_000)] = 0,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    done: Text = "",
) -> Response:
    """The layers that the reader may see, a page at a time."""
    search = Search(q.strip(), match, sort, order, after, skip, limit)
    found = await _find(request, layers, grant, search)
    first_visit = not (found.layers or search.text or search.after or search.skip)
    return respond_page(
        request,
        "first.html" if first_visit else "layers.html",
        search=search,
        found=found,
        drift=await drift_of(layers, found.layers),
        drift_measured=layers.drift.measures,
        link=lambda **changes: _query(search, changes),
        origin=origin_of(request),
        done=_DONE.get(done, ""),
    )


@router.get("/ui/", dependencies=[READ])
async def slash(request: Request) -> Response:
    """For those who type the slash."""
    return redirect(request, "")


@router.post("/ui/example", dependencies=[TRAIN])
async def example(request: Request, layers: LayersDependency, grant: GrantDependency, form: Form) -> Response:
    """Creates layers and trains them, so that there is something to look at."""
    await load_example(layers, grant.prefix)
    return redirect(request, "?done=example")


async def _find(request: Request, layers: Layers, grant: Grant, search: Search) -> Found:
    if not search.scans:
        return await find_layers(layers, grant, search)
    state = request.app.state
    if not hasattr(state, "scans"):
        state.scans = ScanQueue()
    async with state.scans.turn():
        return await find_layers(layers, grant, search)


def _query(search: Search, changes: dict[str, Any]) -> str:
    """The query string of a search with changes. A new order begins at the first page."""
    values = asdict(search) | {"after": "", "skip": 0} | changes
    given = {_SHORT_NAMES.get(name, name): value for name, value in values.items() if value != _DEFAULTS[name]}
    return f"?{urlencode(given)}" if given else "?"
