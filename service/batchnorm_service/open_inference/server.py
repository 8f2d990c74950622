"""The server: metadata, health, and the index of its layers."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

from batchnorm_client.wire.documents import LayerSummary
from batchnorm_client.wire.errors import PayloadTooLarge
from batchnorm_service import __version__
from batchnorm_service.layers import Layers
from batchnorm_service.rest.bodies import read_body
from batchnorm_service.rest.documents import parse_document
from batchnorm_service.rest.headers import read_headers
from batchnorm_service.rest.openapi import describe_responses, ref
from batchnorm_service.rest.responses import Response, respond_json
from batchnorm_service.rest.routes import READ, GrantDependency, LayersDependency, document_router

from .documents import IndexEntry, IndexRequest, Live, Ready, ServerMetadata
from .forms import check_form

NAME: Final = "batchnorm-service"
EXTENSIONS: Final = ("binary_tensor_data", "parameters", "statistics", "model_repository(index)")

_PAGE: Final = 1000
_MOST: Final = 100_000

router = document_router("open inference protocol")


@router.get("/v2", summary="The server's metadata", responses=describe_responses("The metadata", guarded=False))
async def server_metadata() -> ServerMetadata:
    """Name, version and extensions: docs/open-inference.md."""
    return ServerMetadata(name=NAME, version=__version__, extensions=list(EXTENSIONS))


@router.get("/v2/health/live", summary="The process is alive", responses=describe_responses("It is", guarded=False))
async def server_live() -> Live:
    """Does not check the store."""
    return Live()


@router.get(
    "/v2/health/ready", summary="The store can be reached", responses=describe_responses("It can", guarded=False)
)
async def server_ready(layers: LayersDependency) -> Ready:
    """503 while it cannot."""
    await layers.ping()
    return Ready()


@router.post(
    "/v2/repository/index",
    dependencies=[READ],
    summary="List layers by name",
    response_model=list[IndexEntry],
    responses=describe_responses(
        "The layers that the token sees", problems=("malformed-body", "payload-too-large", "unsupported-media-type")
    ),
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": ref("IndexRequest")}}}},
)
async def repository_index(request: Request, layers: LayersDependency, grant: GrantDependency) -> Response:
    """At most 100,000: the protocol has no pages, but `GET /v1/layers` has."""
    headers = read_headers(request.scope["headers"])
    check_form(headers)
    body = await read_body(headers, request.receive, request.app.state.options.max_body_bytes)
    if body:
        await layers.decode(len(body), parse_document, IndexRequest, body)
    found = await _all_layers(layers, grant.prefix)
    return await layers.encode(64 * len(found), _respond_with_index, found)


async def _all_layers(layers: Layers, prefix: str) -> list[LayerSummary]:
    found: list[LayerSummary] = []
    after: str | None = ""
    while after is not None:
        page = await layers.list(prefix, after, _PAGE)
        found += page.layers
        after = page.next
        if len(found) > _MOST:
            raise PayloadTooLarge(f"there are more than {_MOST} layers; list them with GET /v1/layers", expected=_MOST)
    return found


def _respond_with_index(found: list[LayerSummary]) -> Response:
    entries = [{"name": layer.name, "version": str(layer.version), "state": "READY", "reason": ""} for layer in found]
    return respond_json(200, entries)
