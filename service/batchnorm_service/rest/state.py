"""Routes for a layer's tensors, under their names in torch's state_dict."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Final

from fastapi import Query
from starlette.requests import Request
from starlette.responses import JSONResponse

from batchnorm_client.wire.documents import Layer
from batchnorm_client.wire.headers import DIGEST
from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.tensors import decode, encode

from .bodies import read_body
from .headers import read_headers
from .negotiation import accepted, content_type
from .openapi import describe_responses, ref, tensor_body, tensor_content
from .preconditions import etag, matches_none
from .queries import NoQuery, StateQuery, parse_query
from .responses import RAW_DIGEST, Response, respond_empty, respond_with_layer, text_bytes
from .routes import READ, TRAIN, IfMatch, IfNoneMatch, LayerName, LayersDependency, tensor_router

_FORMS: Final = (SAFETENSORS, JSON)
_NAMES: Final = (
    "running_mean, running_var, num_batches_tracked, weight, bias; of a population layer also samples_tracked,"
    " population_mean, population_m2, population_weights"
)

router = tensor_router("state")


@router.get(
    "/v1/layers/{name}/state",
    dependencies=[READ],
    summary="A layer's tensors, as torch's state_dict has them",
    responses=describe_responses(
        "The tensors",
        "ETag",
        DIGEST,
        content=tensor_content(_FORMS, ref("LayerState"), _NAMES),
        unchanged=True,
        problems=("layer-not-found", "version-not-found", "not-acceptable"),
    ),
)
async def get_state(
    name: LayerName,
    request: Request,
    layers: LayersDependency,
    _query: Annotated[StateQuery, Query()],
    _if_none_match: IfNoneMatch = None,
) -> Response:
    """A safetensors file by default."""
    query = parse_query(StateQuery, request.scope["query_string"])
    headers = read_headers(request.scope["headers"])
    form = accepted(headers.get(b"accept"), _FORMS)[0]
    layer = await layers.get(name, query.state)
    tags = [(b"etag", etag(layer.version)), (b"vary", b"accept"), (RAW_DIGEST, layer.digest.encode())]
    if not matches_none(headers.get(b"if-none-match"), layer.version):
        return respond_empty(304, tags)
    size = text_bytes(form, layer.tensors.values())
    return Response(200, form, await layers.encode(size, encode, form, layer.tensors), tags)


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
