"""A layer's drift: what it is now, and over time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
from starlette.requests import Request

from batchnorm_client.wire.documents import LayerSummary
from batchnorm_client.wire.errors import LayerNotFound
from batchnorm_service.layers import DriftReport, Layers
from batchnorm_service.layers.drift_history import group_size, shift_of
from batchnorm_service.rest.headers import read_headers
from batchnorm_service.rest.preconditions import state_etag
from batchnorm_service.rest.responses import Response, respond_empty, respond_json
from batchnorm_service.rest.routes import READ, LayerName, LayersDependency

from .rendering import HEADERS, page_router
from .vectors import MAX_POINTS

MAX_CHANNELS: Final = 1 << 18
"""Of all layers of a list together: each layer is read as a whole, and 50 of a million channels would be gigabytes."""

_AT_ONCE: Final = 16
_NUMBER_BYTES: Final = 32
_SPARKLINE_COLUMNS: Final = 32
_WIDTH, _HEIGHT = 72, 20

router = page_router()


@dataclass(frozen=True, slots=True)
class DriftNow:
    """Drift in words and in a small picture.

    Attributes:
        batches: how many batches were compared.
        score, threshold: drift begins where the score reaches the threshold.
        drifting: whether there is drift; `since`: when it began.
        worst: the channel that is farthest, its z, and the ratio of its standard deviation to the running one; or None.
        line: the score over time as the points of an SVG polyline, `_WIDTH` wide and `_HEIGHT` high; may be empty.
    """

    batches: int
    score: float
    threshold: float
    since: Any
    worst: tuple[int, float, float] | None
    line: str

    @property
    def drifting(self) -> bool:
        """Whether there is drift."""
        return self.since is not None


def drift_now(report: DriftReport) -> DriftNow:
    """What is shown of a report in a table or in a sentence."""
    drift, worst = report.drift, report.drift.worst
    far = None
    if worst is not None:
        far = worst, float(drift.z[worst]), math.exp(float(drift.log_var_ratio[worst]) / 2)
    line = _sparkline(report.history.scores.tolist(), report.threshold)
    return DriftNow(drift.batches, drift.score, report.threshold, report.since, far, line)


def _sparkline(scores: Sequence[float], threshold: float) -> str:
    """The last scores; the threshold is at half of the height, unless a score is more than twice as much."""
    shown = scores[-_SPARKLINE_COLUMNS:]
    if not shown:
        return ""
    most, across = max(2 * threshold, *shown), _WIDTH / (_SPARKLINE_COLUMNS - 1)
    first = _SPARKLINE_COLUMNS - len(shown)
    heights = [_HEIGHT - 1 - (_HEIGHT - 2) * score / most for score in shown]
    points = [f"{(first + n) * across:.1f},{height:.1f}" for n, height in enumerate(heights)]
    return " ".join(points if len(points) > 1 else [f"{_WIDTH - across:.1f},{heights[0]:.1f}", *points])


async def drift_of(layers: Layers, shown: Sequence[LayerSummary]) -> dict[str, DriftNow]:
    """The drift of the layers of a page, by name; none of those after `MAX_CHANNELS`, or if it is not measured."""

    async def one(name: str) -> DriftNow | None:
        try:
            return drift_now(await layers.drift.read(name))
        except LayerNotFound:  # deleted since it was listed
            return None

    if not layers.drift.measures:
        return {}
    channels = accumulate(layer.num_features for layer in shown)
    names = [layer.name for layer, count in zip(shown, channels, strict=True) if count <= MAX_CHANNELS]
    found: list[DriftNow | None] = []
    for first in range(0, len(names), _AT_ONCE):
        found += await asyncio.gather(*(one(name) for name in names[first : first + _AT_ONCE]))
    return {name: drift for name, drift in zip(names, found, strict=True) if drift is not None}


@router.get("/ui/layers/{name}/drift", dependencies=[READ])
async def layer_drift(name: LayerName, request: Request, layers: LayersDependency) -> Response:
    """The drift by channel and over time, for charts; 304 where the reader has it."""
    report = await layers.drift.read(name)
    headers = [(b"etag", state_etag(report.tag)), *HEADERS]
    if read_headers(request.scope["headers"]).get(b"if-none-match") == headers[0][1]:
        return respond_empty(304, headers)
    response = await layers.encode(_NUMBER_BYTES * len(report.drift.z), _respond, report)
    response.raw_headers += headers
    return response


def _respond(report: DriftReport) -> Response:
    drift, history, channels = report.drift, report.history, len(report.drift.z)
    document: dict[str, Any] = {
        "batches": drift.batches,
        "score": drift.score,
        "threshold": report.threshold,
        "channels": channels,
        "z": None if channels > MAX_POINTS else drift.z.astype(np.float32),
        "log_var_ratio": None if channels > MAX_POINTS else drift.log_var_ratio.astype(np.float32),
        "history": {
            "step": history.step,
            "group": group_size(channels),
            "times": history.times,
            "scores": history.scores,
            "shifts": shift_of(history.shifts),
        },
    }
    return respond_json(200, document)
