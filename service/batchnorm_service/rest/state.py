"""Routes for a layer's tensors, under their names in torch's state_dict."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Final

from fastapi import Query
from starlette.requests import Request
from starlette.responses import JSONResponse

from batchnorm_client.wire.documents import Layer
from batchnorm_client.wire.headers import DIGEST, VERSION
from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.tensors import decode, encode
from batchnorm_service.layers import Layers, LayerStates, Selection, Snapshot, is_known

from .bodies import read_body
from .headers import read_headers
from .layer_request import LayerRequest
from .negotiation import accepted, content_type
from .openapi import describe_responses, ref, tensor_body, tensor_content
from .preconditions import known_tags, state_etag
from .queries import NoQuery, TensorsQuery, parse_query
from .responses import RAW_DIGEST, Piece, RawHeader, Response, respond_empty, respond_with_layer, text_bytes
from .routes import READ, TRAIN, IfMatch, IfNoneMatch, LayerName, LayersDependency, call_endpoint, tensor_router
from .waiting import VARY, find_states, respond_once

_FORMS: Final = (SAFETENSORS, JSON)
_NAMES: Final = (
    "running_mean, running_var, num_batches_tracked, weight, bias; of a population layer also samples_tracked,"
    " population_mean, population_m2, population_weights"
)

_VERSION: Final = VERSION.lower().encode()

router = tensor_router("state")


@router.get(
    "/v1/layers/{name}/state",
    dependencies=[READ],
    summary="A layer's tensors, as torch's state_dict has them",
    responses=describe_responses(
        "The tensors",
        "ETag",
        VERSION,
        DIGEST,
        content=tensor_content(_FORMS, ref("LayerState"), _NAMES),
        unchanged=True,
        problems=("layer-not-found", "version-not-found", "not-acceptable"),
    ),
)
async def get_state(
    name: LayerName, request: Request, _query: Annotated[TensorsQuery, Query()], _if_none_match: IfNoneMatch = None
) -> Response:
    """A safetensors file by default. With `wait` and If-None-Match, the response comes when there is another state."""
    return await call_endpoint(name, request)


async def read_state(layers: Layers, request: LayerRequest) -> Response:
    """The endpoint of `get_state`; without FastAPI, because many clients wait for each state."""
    query = parse_query(TensorsQuery, request.query)
    form = accepted(request.headers.get(b"accept"), _FORMS)[0]
    known = known_tags(request.headers.get(b"if-none-match"))
    if query.at is not None:
        layer = await layers.get(request.name, query.state)
        if known is not None and is_known(known, (layer.tag, str(layer.version))):
            return respond_empty(304, _headers(layer))
        return Response(200, form, await _encode(layers, form, layer), _headers(layer))
    found = await find_states(layers, request, Selection((request.name,)), known, query.wait)
    if found.states is None:
        return respond_empty(304, [*VARY, (b"etag", state_etag(found.tags[1]))])
    if found.known:
        return respond_empty(304, _headers(await layers.snapshot(found.states)))
    return await respond_once(layers, found.states, form, partial(_respond, layers, form, found.states))


async def _respond(layers: Layers, form: str, states: LayerStates) -> Response:
    layer = await layers.snapshot(states)
    return Response(200, form, await _encode(layers, form, layer), _headers(layer))


async def _encode(layers: Layers, form: str, layer: Snapshot) -> list[Piece]:
    return await layers.encode(text_bytes(form, layer.tensors.values()), encode, form, layer.tensors)


def _headers(layer: Snapshot) -> list[RawHeader]:
    return [
        (b"etag", state_etag(layer.tag)),
        *VARY,
        (RAW_DIGEST, layer.digest.encode()),
        (_VERSION, b"%d" % layer.version),
    ]


@router.put(
    "/v1/layers/{name}/state",
    dependencies=[TRAIN],
    summary="Replace some or all of a layer's tensors",
    response_model=Layer,
    response_class=JSONResponse,
    responses=describe_responses(
        "The layer",
        "ETag",
        problems=(
            "malformed-body",
            "layer-not-found",
            "version-mismatch",
            "payload-too-large",
            "unsupported-media-type",
            "shape-mismatch",
            "dtype-mismatch",
            "non-finite",
        ),
    ),
    openapi_extra=tensor_body(_FORMS, "LayerState", _NAMES),
)
async def replace_state(name: LayerName, request: Request, layers: LayersDependency, versions: IfMatch) -> Response:
    """Omitted tensors stay unchanged."""
    parse_query(NoQuery, request.scope["query_string"])
    headers = read_headers(request.scope["headers"])
    form = content_type(headers, _FORMS)
    body = await read_body(headers, request.receive, request.app.state.options.max_body_bytes)
    layer = await layers.replace_state(name, partial(decode, form, body), versions, nbytes=len(body))
    return await respond_with_layer(layers, 200, layer)
