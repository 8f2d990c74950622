"""A layer's page, its values for charts, and its state as a file."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import Query
from starlette.requests import Request

from batchnorm_client.wire.names import STATE_PATTERN
from batchnorm_service.layers import Snapshot
from batchnorm_service.rest.headers import read_headers
from batchnorm_service.rest.layer_request import LayerRequest
from batchnorm_service.rest.preconditions import state_etag
from batchnorm_service.rest.responses import Response, respond_empty, respond_json
from batchnorm_service.rest.routes import READ, LayerName, LayersDependency
from batchnorm_service.rest.state import read_state

from .drift import drift_now
from .rendering import HEADERS, origin_of, page_router, respond_page
from .vectors import chart_data, summaries

_HISTORY: Final = 50
_VALUE_BYTES: Final = 40
"""About how much work a channel is, in bytes, to decide whether a thread does it."""

_DONE: Final = {
    "reset-running_stats": "The running statistics are as of a new layer again. The state before is in the history.",
    "reset-parameters": "Weight and bias have their initial values again. The state before is in the history.",
    "reset-all": "Statistics, weight and bias have their initial values again. The state before is in the history.",
    "rollback": "The layer is back at the state that you chose. The state before is in the history.",
    "pin": "The state is pinned: it stays until the pin is deleted.",
    "unpin": "The pin is deleted.",
}

router = page_router()

At = Annotated[str | None, Query(pattern=f"^({STATE_PATTERN.pattern})$", max_length=200)]


@router.get("/ui/layers/{name}", dependencies=[READ])
async def layer_page(
    name: LayerName,
    request: Request,
    layers: LayersDependency,
    at: At = None,
    done: Annotated[str, Query(max_length=40)] = "",
) -> Response:
    """Everything about a layer; with `at`, about one of its kept states."""
    layer = await layers.get(name, _state(at))
    kept, pins = await layers.history.list(name, _HISTORY, None), await layers.history.pins(name)
    tags: defaultdict[int, list[str]] = defaultdict(list)
    for pin in pins.pins:
        tags[pin.version].append(pin.tag)
    return respond_page(
        request,
        "layer.html",
        layer=layer,
        at=at,
        drift=drift_now(await layers.drift.read(name)) if at is None and layers.drift.measures else None,
        config=layer.config.model_dump(),
        vectors=await layers.encode(_work(layer), summaries, layer.tensors),
        history=kept.history,
        more_history=kept.next is not None,
        pins=pins.pins,
        tags=tags,
        done=_DONE.get(done, ""),
        origin=origin_of(request),
        batch_shape=_batch_shape(layer),
        max_body_bytes=request.app.state.options.max_body_bytes,
        accepted_dtypes="float64" if layer.config.dtype == "float64" else "float16, bfloat16 or float32",
    )


@router.get("/ui/layers/{name}/values", dependencies=[READ])
async def layer_values(name: LayerName, request: Request, layers: LayersDependency, at: At = None) -> Response:
    """Values per channel for the charts; 304 where the reader has those of this state."""
    layer = await layers.get(name, _state(at))
    headers = [(b"etag", state_etag(layer.tag)), *HEADERS]
    if read_headers(request.scope["headers"]).get(b"if-none-match") == headers[0][1]:
        return respond_empty(304, headers)
    respond = partial(_respond_with_values, layer)
    response = await layers.encode(_work(layer), respond)
    response.raw_headers += headers
    return response


@router.get("/ui/layers/{name}/state", dependencies=[READ])
async def download_state(name: LayerName, request: Request, layers: LayersDependency, at: At = None) -> Response:
    """The state as `GET /v1/layers/{name}/state` gives it, as a file."""
    query = b"" if at is None else urlencode({"at": at}).encode()
    response = await read_state(layers, LayerRequest(name, query, {}, grant=request.state.grant))
    file = name if at is None else f"{name}@{at}"
    response.raw_headers += [
        *HEADERS,
        (b"content-disposition", f'attachment; filename="{file}.safetensors"'.encode()),
    ]
    return response


def _state(at: str | None) -> int | str | None:
    return int(at) if at is not None and at.isdecimal() else at


def _work(layer: Snapshot) -> int:
    return _VALUE_BYTES * layer.config.num_features


def _respond_with_values(layer: Snapshot) -> Response:
    document: dict[str, Any] = {"version": layer.version, **chart_data(layer.tensors)}
    return respond_json(200, document)


def _batch_shape(layer: Snapshot) -> list[int]:
    """The shape of a small batch that the layer takes: 64 samples, fewer with many channels."""
    config = layer.config
    rank, axis = config.smallest_rank, config.channel_axis % config.smallest_rank
    samples = max(2, min(64, 65_536 // config.num_features))
    return [config.num_features if place == axis else samples if place == 0 else 1 for place in range(rank)]
