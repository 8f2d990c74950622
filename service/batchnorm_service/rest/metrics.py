"""The metrics, for Prometheus."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Final

from fastapi import Header
from fastapi.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response as StarletteResponse

from batchnorm_client.wire.errors import NotFound
from batchnorm_service.layers.shared_check import SharedCheck
from batchnorm_service.runtime import RUNTIME, Runtime
from batchnorm_service.telemetry import Metrics

from .openapi import describe_responses
from .responses import Response
from .routes import document_router

_TEXT: Final = {"schema": {"type": "string"}}

_OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0"

router = document_router("health")


class MetricsReader:
    """Renders metrics once for all who ask meanwhile: it takes long, and callers may need no token for it.

    Args:
        metrics: of the service.
        runtime: tasks.
    """

    def __init__(self, metrics: Metrics, runtime: Runtime = RUNTIME) -> None:
        self._metrics = metrics
        self._forms = {accept: SharedCheck(partial(self._render, accept), runtime) for accept in ("", _OPENMETRICS)}

    async def read(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the form that the header Accept names, and the media type."""
        # Of the header, only this is used: what it says about versions is not known to be valid.
        return await self._forms[_OPENMETRICS if "application/openmetrics-text" in accept.lower() else ""]()

    async def _render(self, accept: str) -> tuple[bytes, str]:
        self._metrics.read_gauges()
        return await run_in_threadpool(self._metrics.render, accept)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=StarletteResponse,
    responses=describe_responses(
        "Text in Prometheus's format, or as OpenMetrics where Accept names it",
        content={"text/plain": _TEXT, "application/openmetrics-text": _TEXT},
        problems=("not-found",),
        guarded=False,
    ),
)
async def read_metrics(request: Request, accept: Annotated[str, Header(include_in_schema=False)] = "") -> Response:
    """Of all workers, whichever responds. They are listed in docs/metrics.md."""
    reader: MetricsReader | None = request.app.state.metrics_reader
    if reader is None:
        raise NotFound("metrics are off: BATCHNORM_METRICS")
    text, media_type = await reader.read(accept)
    return Response(200, media_type, [text])
