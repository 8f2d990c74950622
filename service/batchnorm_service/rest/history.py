"""Routes for a layer's history: kept states, rollback, pins."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from batchnorm_client.wire.documents import (
    MAX_VERSION,
    HistoryPage,
    Layer,
    Pin,
    PinRequest,
    Pins,
    RollbackRequest,
)
from batchnorm_client.wire.headers import IDEMPOTENT_REPLAY
from batchnorm_client.wire.names import TAG_PATTERN

from .openapi import describe_responses
from .responses import Response, respond_json, respond_with_layer
from .routes import (
    ADMIN,
    DOCUMENT_PROBLEMS,
    READ,
    TRAIN,
    IdempotencyKey,
    IfMatch,
    LayerName,
    LayersDependency,
    document_router,
)

router = document_router("history")

Tag = Annotated[
    str,
    Path(
        pattern=f"^({TAG_PATTERN.pattern})$",
        max_length=200,
        description="the pin's name: as a layer's, but not only digits",
    ),
]


@router.get(
    "/v1/layers/{name}/history",
    dependencies=[READ],
    summary="A layer's kept states",
    responses=describe_responses("A page of states", problems=("layer-not-found",)),
)
async def list_history(
    name: LayerName,
    layers: LayersDependency,
    limit: Annotated[int, Query(ge=1, le=1000, description="at most so many states")] = 100,
    before: Annotated[
        int | None, Query(ge=0, le=MAX_VERSION, description="only versions below this: `next` of the page before")
    ] = None,
) -> HistoryPage:
    """The newest state and those that are kept. Pass `next` of a page as `before` to get the next page."""
    return await layers.history.list(name, limit, before)


@router.post(
    "/v1/layers/{name}/rollback",
    dependencies=[ADMIN],
    summary="Go back to a kept state",
    response_model=Layer,
    responses=describe_responses(
        "The layer",
        "ETag",
        IDEMPOTENT_REPLAY,
        problems=(
            *DOCUMENT_PROBLEMS,
            "layer-not-found",
            "version-not-found",
            "version-mismatch",
            "idempotency-key-reused",
        ),
    ),
)
async def rollback_layer(
    name: LayerName, layers: LayersDependency, key: IdempotencyKey, versions: IfMatch, body: RollbackRequest
) -> Response:
    """Commits that state's tensors, counters and config under a new version. The state before is kept, too."""
    to = body.tag if body.version is None else body.version
    assert to is not None  # noqa: S101 - the model has one of them
    layer, replayed = await layers.rollback(name, to, key, versions)
    return await respond_with_layer(layers, 200, layer, replayed=replayed)


@router.get(
    "/v1/layers/{name}/pins",
    dependencies=[READ],
    summary="A layer's pins",
    responses=describe_responses("The pins, by tag", problems=("layer-not-found",)),
)
async def list_pins(name: LayerName, layers: LayersDependency) -> Pins:
    """A state that is pinned stays until its pins are deleted."""
    return await layers.history.pins(name)


@router.get(
    "/v1/layers/{name}/pins/{tag}",
    dependencies=[READ],
    summary="A pin",
    responses=describe_responses("The pin", problems=("layer-not-found", "version-not-found")),
)
async def get_pin(name: LayerName, tag: Tag, layers: LayersDependency) -> Pin:
    """The version and the digest of the state that is kept under this tag."""
    return await layers.history.get_pin(name, tag)


@router.put(
    "/v1/layers/{name}/pins/{tag}",
    dependencies=[TRAIN],
    summary="Keep a state under a tag",
    response_model=Pin,
    responses={
        **describe_responses(
            "The tag stands for this state already, or the call is a repeat",
            problems=(
                *DOCUMENT_PROBLEMS,
                "layer-not-found",
                "version-not-found",
                "pin-exists",
                "too-many-pins",
                "idempotency-key-reused",
            ),
        ),
        201: {**describe_responses("The state is pinned", "Location")[200], "model": Pin},
    },
)
async def pin_state(
    name: LayerName,
    tag: Tag,
    layers: LayersDependency,
    key: IdempotencyKey,
    body: PinRequest = PinRequest(),  # noqa: B008 - it is immutable
) -> Response:
    """The newest state, or that of `version`, is kept and can be read with `?at=<tag>` until the pin is deleted."""
    pin, created = await layers.history.pin(name, tag, body.version, key)
    headers = [(b"location", f"/v1/layers/{name}/pins/{tag}".encode())] if created else []
    return respond_json(201 if created else 200, pin.model_dump(), headers)


@router.delete(
    "/v1/layers/{name}/pins/{tag}",
    dependencies=[ADMIN],
    summary="Delete a pin",
    status_code=204,
    responses=describe_responses("Deleted", status=204, problems=("layer-not-found", "version-not-found")),
)
async def delete_pin(name: LayerName, tag: Tag, layers: LayersDependency) -> None:
    """Its state then stays only as long as other kept states."""
    await layers.history.unpin(name, tag)
