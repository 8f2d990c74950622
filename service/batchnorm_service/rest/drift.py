"""The route for a layer's drift."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchnorm_client.wire.documents import Drift
from batchnorm_service.layers import DriftReport

from .openapi import describe_responses
from .preconditions import known_tags, state_etag
from .responses import Response, respond_empty, respond_json
from .routes import READ, IfNoneMatch, LayerName, LayersDependency, document_router

router = document_router("drift")

_NUMBER_BYTES = 32
"""About how long the two numbers of a channel are."""


@router.get(
    "/v1/layers/{name}/drift",
    dependencies=[READ],
    summary="How far the batches that come in are from the running statistics",
    response_model=Drift,
    responses=describe_responses("The drift", "ETag", unchanged=True, problems=("layer-not-found",)),
)
async def get_drift(name: LayerName, layers: LayersDependency, if_none_match: IfNoneMatch = None) -> Response:
    """Of all batches that were folded, and of a sample of those that were only normalized, whichever process had them.

    What another process measured in the last second may be missing.
    """
    report = await layers.drift.read(name)
    tag = (b"etag", state_etag(report.tag))
    known = known_tags(None if if_none_match is None else if_none_match.encode("latin-1"))
    if known is not None and (report.tag in known or "*" in known):
        return respond_empty(304, [tag])
    return await layers.encode(_NUMBER_BYTES * len(report.drift.z), _respond, report, tag)


def _respond(report: DriftReport, tag: tuple[bytes, bytes]) -> Response:
    drift, worst = report.drift, report.drift.worst
    document: dict[str, Any] = {
        "batches": drift.batches,
        "score": drift.score,
        "worst": None
        if worst is None
        else {"channel": worst, "z": float(drift.z[worst]), "log_var_ratio": float(drift.log_var_ratio[worst])},
        "channels": {"z": drift.z.astype(np.float32), "log_var_ratio": drift.log_var_ratio.astype(np.float32)},
        "threshold": report.threshold,
        "drifting": report.since is not None,
        "since": report.since,
    }
    return respond_json(200, document, [tag])
