"""Routes for layers as resources: create, list, get, update, delete, reset."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query
from starlette.requests import Request

from batchnorm_client.wire.documents import Layer, LayerConfig, LayerPage, LayerUpdate, ResetRequest
from batchnorm_client.wire.headers import IDEMPOTENT_REPLAY
from batchnorm_client.wire.media_types import MERGE_PATCH_JSON
from batchnorm_service.layers import Layers
from batchnorm_service.tokens import Scope

from .layer_request import LayerRequest
from .openapi import CONFIG_EXAMPLES, describe_responses, ref
from .preconditions import etag, matches_none
from .queries import StateQuery, parse_query
from .responses import Response, respond_empty, respond_with_layer
from .routes import (
    ADMIN,
    DOCUMENT_PROBLEMS,
    READ,
    TRAIN,
    GrantDependency,
    IdempotencyKey,
    IfMatch,
    IfNoneMatch,
    LayerName,
    LayersDependency,
    call_endpoint,
    document_router,
)
from .security import require

router = document_router("layers")

_PARAMETERS = frozenset({"weight", "bias"})


@router.get(
    "/v1/layers", dependencies=[READ], summary="List layers by name", responses=describe_responses("A page of layers")
)
async def list_layers(
    layers: LayersDependency,
    grant: GrantDependency,
    prefix: Annotated[str, Query(max_length=200, description="only layers whose names start with this")] = "",
    after: Annotated[
        str, Query(max_length=200, description="only layers after this name: `next` of the page before")
    ] = "",
    limit: Annotated[int, Query(ge=1, le=1000, description="at most so many layers")] = 100,
) -> LayerPage:
    """Pass `next` of a page as `after` to get the next page; it is null on the last page."""
    visible = grant.visible_prefix(prefix)
    return LayerPage(layers=[], next=None) if visible is None else await layers.list(visible, after, limit)


@router.get(
    "/v1/layers/{name}",
    dependencies=[READ],
    summary="A layer's config and state",
    response_model=Layer,
    responses=describe_responses(
        "The layer", "ETag", unchanged=True, problems=("layer-not-found", "version-not-found")
    ),
)
async def get_layer(
    name: LayerName, request: Request, _query: Annotated[StateQuery, Query()], _if_none_match: IfNoneMatch = None
) -> Response:
    """Tensors that the layer does not have are null."""
    return await call_endpoint(name, request)


async def read_layer(layers: Layers, request: LayerRequest) -> Response:
    """The endpoint of `get_layer`; without FastAPI, because clients that normalize locally call it for every batch."""
    layer = await layers.get(request.name, parse_query(StateQuery, request.query).state)
    if matches_none(request.headers.get(b"if-none-match"), layer.version):
        return await respond_with_layer(layers, 200, layer)
    return respond_empty(304, [(b"etag", etag(layer.version))])


@router.put(
    "/v1/layers/{name}",
    dependencies=[TRAIN],
    summary="Create a layer",
    response_model=Layer,
    responses={
        **describe_responses(
            "The layer exists, created with the same config",
            "ETag",
            problems=(*DOCUMENT_PROBLEMS, "layer-exists", "too-many-layers", "device-unavailable", "not-implemented"),
        ),
        201: {**describe_responses("The layer is new", "ETag", "Location")[200], "model": Layer},
    },
    openapi_extra={
        "requestBody": {
            "content": {
                "application/json": {
                    "examples": {name: {"$ref": f"#/components/examples/{name}"} for name in CONFIG_EXAMPLES}
                }
            }
        }
    },
)
async def create_layer(name: LayerName, config: LayerConfig, layers: LayersDependency) -> Response:
    """Idempotent: the config is compared with the one at creation, without what a later PATCH changed."""
    layer, created = await layers.create(name, config)
    if created:
        return await respond_with_layer(layers, 201, layer, [(b"location", f"/v1/layers/{name}".encode())])
    return await respond_with_layer(layers, 200, layer)


@router.patch(
    "/v1/layers/{name}",
    dependencies=[TRAIN],
    summary="Set some of a layer's options and parameters",
    response_model=Layer,
    responses=describe_responses(
        "The layer",
        "ETag",
        problems=(*DOCUMENT_PROBLEMS, "layer-not-found", "version-mismatch", "shape-mismatch", "non-finite"),
    ),
    openapi_extra={"requestBody": {"content": {MERGE_PATCH_JSON: {"schema": ref("LayerUpdate")}}}},
)
async def update_layer(
    name: LayerName, update: LayerUpdate, layers: LayersDependency, versions: IfMatch, grant: GrantDependency
) -> Response:
    """Omitted fields stay unchanged; `momentum: null` means the cumulative average.

    All fields but `weight` and `bias` need the scope `admin`.
    """
    if not update.model_fields_set <= _PARAMETERS:
        require(grant, Scope.ADMIN)
    return await respond_with_layer(layers, 200, await layers.update(name, update, versions))


@router.delete(
    "/v1/layers/{name}",
    dependencies=[ADMIN],
    summary="Delete a layer, its idempotency receipts and its history",
    status_code=204,
    responses=describe_responses(
        "Deleted", status=204, problems=("layer-not-found", "version-mismatch", "layer-pinned")
    ),
)
async def delete_layer(
    name: LayerName,
    layers: LayersDependency,
    versions: IfMatch,
    pins: Annotated[
        Literal["keep", "delete"], Query(description="`delete` deletes a layer that has pins, and its pins with it")
    ] = "keep",
) -> None:
    """If a layer of this name is created again, its versions continue above those of the deleted one."""
    await layers.delete(name, versions, with_pins=pins == "delete")


@router.post(
    "/v1/layers/{name}/reset",
    dependencies=[ADMIN],
    summary="Set running statistics or parameters back to their initial values",
    response_model=Layer,
    responses=describe_responses(
        "The layer",
        "ETag",
        IDEMPOTENT_REPLAY,
        problems=(*DOCUMENT_PROBLEMS, "layer-not-found", "version-mismatch", "idempotency-key-reused"),
    ),
)
async def reset_layer(
    name: LayerName,
    layers: LayersDependency,
    key: IdempotencyKey,
    versions: IfMatch,
    body: ResetRequest = ResetRequest(),  # noqa: B008 - it is immutable
) -> Response:
    """Like torch's reset_running_stats and reset_parameters; without a body, `running_stats`."""
    layer, replayed = await layers.reset(name, body.what, key, versions)
    return await respond_with_layer(layers, 200, layer, replayed=replayed)
