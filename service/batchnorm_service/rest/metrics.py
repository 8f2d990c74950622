"""The metrics, for Prometheus."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import Header
from fastapi.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response as StarletteResponse

from batchnorm_client.wire.errors import NotFound
from batchnorm_service.telemetry import Metrics

from .openapi import describe_responses
from .responses import Response
from .routes import document_router

_TEXT: Final = {"schema": {"type": "string"}}

router = document_router("health")


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
    metrics: Metrics | None = request.app.state.metrics
    if metrics is None:
        raise NotFound("metrics are off: BATCHNORM_METRICS")
    metrics.read_gauges()
    text, media_type = await run_in_threadpool(metrics.render, accept)
    return Response(200, media_type, [text])
