"""Layers as resources: create, list, inspect, change, delete, reset."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request

from batchnorm_client.wire.documents import LayerConfig, LayerUpdate, ResetRequest
from batchnorm_client.wire.headers import IDEMPOTENCY_KEY, IDEMPOTENT_REPLAY
from batchnorm_client.wire.media_types import JSON, MERGE_PATCH_JSON
from batchnorm_service.layers import Layers

from .documents import read_document
from .headers import idempotency_key, read_headers
from .openapi import CONFIG_EXAMPLES, LayerNamePath, describe, empty_response, json_body, json_response
from .preconditions import etag, if_match, none_match_holds
from .queries import ListQuery, NoQuery, parse_query
from .responses import Response, respond_empty, respond_json, respond_with_layer

_DOCUMENT = ("malformed-body", "payload-too-large", "unsupported-media-type")
_LAYER = json_response("Layer", "The layer", ("ETag",))


def add_layer_routes(app: FastAPI, layers: Layers, max_body_bytes: int) -> None:
    """The calls on layers, as routes of `app`."""
    _add_reading(app, layers)
    _add_changing(app, layers, max_body_bytes)
    _add_reset(app, layers, max_body_bytes)


def _add_reading(app: FastAPI, layers: Layers) -> None:
    @app.get(
        "/v1/layers",
        **describe(
            "list_layers",
            "Which layers there are, by name",
            query=ListQuery,
            answers={200: json_response("LayerPage", "A page of the listing")},
        ),
    )
    async def list_layers(request: Request) -> Response:
        """`next` of one page is `after` of the next; null on the last."""
        query = parse_query(ListQuery, request.scope["query_string"])
        page = await layers.list(query.prefix, query.after, query.limit)
        return respond_json(200, page.model_dump())

    @app.get(
        "/v1/layers/{name}",
        **describe(
            "get_layer",
            "A layer's config and state",
            headers=("If-None-Match",),
            answers={200: _LAYER, 304: empty_response("The version is one of those in If-None-Match", ("ETag",))},
            problems=("layer-not-found",),
        ),
    )
    async def get_layer(name: LayerNamePath, request: Request) -> Response:
        """A tensor that the config leaves out is null."""
        parse_query(NoQuery, request.scope["query_string"])
        layer = await layers.get(name)
        if none_match_holds(read_headers(request.scope["headers"]), layer.version):
            return await respond_with_layer(layers, 200, layer)
        return respond_empty(304, [(b"etag", etag(layer.version))])


def _add_changing(app: FastAPI, layers: Layers, max_body_bytes: int) -> None:
    @app.put(
        "/v1/layers/{name}",
        **describe(
            "create_layer",
            "Create a layer",
            body=json_body("LayerConfig", examples=tuple(CONFIG_EXAMPLES)),
            answers={
                200: json_response("Layer", "The layer exists, created with the same config", ("ETag",)),
                201: json_response("Layer", "The layer is new", ("ETag", "Location")),
            },
            problems=(*_DOCUMENT, "layer-exists", "too-many-layers", "device-unavailable", "not-implemented"),
        ),
    )
    async def create_layer(name: LayerNamePath, request: Request) -> Response:
        """Repeating it with the same config is harmless; what a later PATCH changed does not matter."""
        parse_query(NoQuery, request.scope["query_string"])
        config = await read_document(request, layers, LayerConfig, max_body_bytes)
        layer, created = await layers.create(name, config)
        if created:
            return await respond_with_layer(layers, 201, layer, [(b"location", f"/v1/layers/{name}".encode())])
        return await respond_with_layer(layers, 200, layer)

    @app.patch(
        "/v1/layers/{name}",
        **describe(
            "update_layer",
            "Set some of a layer's options and parameters",
            headers=("If-Match",),
            body=json_body("LayerUpdate", (JSON, MERGE_PATCH_JSON)),
            answers={200: _LAYER},
            problems=(*_DOCUMENT, "layer-not-found", "version-mismatch", "shape-mismatch", "non-finite"),
        ),
    )
    async def update_layer(name: LayerNamePath, request: Request) -> Response:
        """A field that is left out stays as it is; `momentum: null` means the cumulative average."""
        parse_query(NoQuery, request.scope["query_string"])
        versions = if_match(read_headers(request.scope["headers"]))
        update = await read_document(request, layers, LayerUpdate, max_body_bytes, (JSON, MERGE_PATCH_JSON))
        return await respond_with_layer(layers, 200, await layers.update(name, update, versions))

    @app.delete(
        "/v1/layers/{name}",
        **describe(
            "delete_layer",
            "Delete a layer and its idempotency receipts",
            headers=("If-Match",),
            answers={204: empty_response("It is gone")},
            problems=("layer-not-found", "version-mismatch"),
        ),
    )
    async def delete_layer(name: LayerNamePath, request: Request) -> Response:
        """A layer that is created under this name later has a larger version."""
        parse_query(NoQuery, request.scope["query_string"])
        await layers.delete(name, if_match(read_headers(request.scope["headers"])))
        return respond_empty(204)


def _add_reset(app: FastAPI, layers: Layers, max_body_bytes: int) -> None:
    @app.post(
        "/v1/layers/{name}/reset",
        **describe(
            "reset_layer",
            "Set running statistics or parameters back to their initial values",
            headers=(IDEMPOTENCY_KEY, "If-Match"),
            body=json_body("ResetRequest", required=False),
            answers={200: json_response("Layer", "The layer", ("ETag", IDEMPOTENT_REPLAY))},
            problems=(*_DOCUMENT, "layer-not-found", "version-mismatch", "idempotency-key-reused"),
        ),
    )
    async def reset_layer(name: LayerNamePath, request: Request) -> Response:
        """As torch's reset_running_stats and reset_parameters; no body means `running_stats`."""
        parse_query(NoQuery, request.scope["query_string"])
        headers = read_headers(request.scope["headers"])
        key, versions = idempotency_key(headers), if_match(headers)
        asked = await read_document(request, layers, ResetRequest, max_body_bytes, empty=ResetRequest())
        layer, replayed = await layers.reset(name, asked.what, key, versions)
        return await respond_with_layer(layers, 200, layer, replayed=replayed)
