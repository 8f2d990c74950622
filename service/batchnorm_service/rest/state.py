"""A layer's tensors, under their names in torch's state_dict."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI
from starlette.requests import Request

from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.tensors import decode, encode
from batchnorm_service.layers import Layers

from .bodies import read_body
from .headers import read_headers
from .negotiation import accepted, content_type
from .openapi import LayerNamePath, describe, empty_response, json_response, ref, tensor_content, tensors_response
from .preconditions import etag, if_match, none_match_holds
from .queries import NoQuery, parse_query
from .responses import Response, respond_empty, respond_with_layer, text_bytes

_FORMS = (SAFETENSORS, JSON)
_NAMES = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
_POPULATION = ("samples_tracked", "population_mean", "population_m2", "population_weights")
_CONTENT = tensor_content(
    _FORMS, ref("LayerState"), f"{', '.join(_NAMES)}; of a population layer also {', '.join(_POPULATION)}"
)


def add_state_routes(app: FastAPI, layers: Layers, max_body_bytes: int) -> None:
    """The calls on a layer's tensors, as routes of `app`."""

    @app.get(
        "/v1/layers/{name}/state",
        **describe(
            "get_state",
            "A layer's tensors, as torch's state_dict has them",
            tag="state",
            headers=("If-None-Match",),
            answers={
                200: tensors_response("The tensors", _CONTENT, ("ETag",)),
                304: empty_response("As it was", ("ETag",)),
            },
            problems=("layer-not-found", "not-acceptable"),
        ),
    )
    async def get_state(name: LayerNamePath, request: Request) -> Response:
        """A safetensors file by default."""
        parse_query(NoQuery, request.scope["query_string"])
        headers = read_headers(request.scope["headers"])
        form = accepted(headers.get(b"accept"), _FORMS)[0]
        layer = await layers.get(name)
        tags = [(b"etag", etag(layer.version)), (b"vary", b"accept")]
        if not none_match_holds(headers, layer.version):
            return respond_empty(304, tags)
        size = text_bytes(form, layer.tensors.values())
        return Response(200, form, await layers.run_codec(size, encode, form, layer.tensors), tags)

    @app.put(
        "/v1/layers/{name}/state",
        **describe(
            "replace_state",
            "Replace some or all of a layer's tensors",
            tag="state",
            headers=("If-Match",),
            body={"required": True, "content": _CONTENT},
            answers={200: json_response("Layer", "The layer", ("ETag",))},
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
    )
    async def replace_state(name: LayerNamePath, request: Request) -> Response:
        """Tensors that are left out stay as they are."""
        parse_query(NoQuery, request.scope["query_string"])
        headers = read_headers(request.scope["headers"])
        versions = if_match(headers)
        form = content_type(headers, _FORMS)
        body = await read_body(headers, request.receive, max_body_bytes)
        layer = await layers.replace_state(name, partial(decode, form, body), versions, nbytes=len(body))
        return await respond_with_layer(layers, 200, layer)
