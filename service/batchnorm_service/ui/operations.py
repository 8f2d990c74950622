"""The service's figures: rates, times, queue and store, from its own metrics."""

from __future__ import annotations

import socket
from dataclasses import asdict
from typing import Any, Final

from starlette.requests import Request

from batchnorm_client.wire.errors import NotFound
from batchnorm_client.wire.figures import Figures, read_figures, together
from batchnorm_service.rest.metrics import MetricsReader
from batchnorm_service.rest.responses import Response, respond_json
from batchnorm_service.rest.routes import READ, GrantDependency
from batchnorm_service.tokens import Grant

from .rendering import HEADERS, page_router, respond_page

_METRICS: Final = "/metrics"

router = page_router()


@router.get("/ui/operations", dependencies=[READ])
async def operations_page(request: Request, grant: GrantDependency) -> Response:
    """The figures since the service started; scripts ask for them again, and draw what changes."""
    figures = await _figures(request, grant)
    whole = None if figures is None else together("all", figures.routes)
    return respond_page(request, "operations.html", figures=figures, whole=whole)


@router.get("/ui/operations/figures", dependencies=[READ])
async def read_figures_now(request: Request, grant: GrantDependency) -> Response:
    """The figures as JSON. `host` tells replicas apart: counters of one are not to be compared with another's."""
    figures = await _figures(request, grant)
    if figures is None:
        raise NotFound("metrics are off: BATCHNORM_METRICS")
    document: dict[str, Any] = asdict(figures)
    return respond_json(200, {"host": socket.gethostname(), **document}, HEADERS)


async def _figures(request: Request, grant: Grant) -> Figures | None:
    """The figures of all workers; None if metrics are off."""
    if grant.prefix and _METRICS in request.app.state.options.guard.closed:
        raise NotFound("the service's figures are not for a token that is bound to a prefix")
    reader: MetricsReader | None = request.app.state.metrics_reader
    if reader is None:
        return None
    text, _ = await reader.read("")
    return read_figures(text.decode())
