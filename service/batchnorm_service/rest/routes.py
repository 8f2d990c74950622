"""Routers and typed parameters for FastAPI routes, with strict parsing of query parameters and JSON bodies.

    router = document_router("layers")

    @router.put("/v1/layers/{name}", dependencies=[TRAIN], ...)
    async def create_layer(name: LayerName, config: LayerConfig, layers: LayersDependency) -> Response: ...

FastAPI takes parameters and body from the signature. `DocumentRoute` adds what FastAPI does not do: it refuses unknown
and repeated query parameters, limits the body's size, and parses it as strict JSON, off the event loop if it is large.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Path
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response as StarletteResponse

from batchnorm_client.wire.headers import IDEMPOTENCY_KEY, KEY_PATTERN
from batchnorm_client.wire.media_types import JSON, MERGE_PATCH_JSON
from batchnorm_client.wire.names import LAYER_NAME_PATTERN
from batchnorm_service.layers import Layers
from batchnorm_service.tokens import Grant, Scope

from .bodies import read_body
from .documents import parse_document
from .headers import idempotency_key, read_headers
from .layer_request import Endpoint, LayerRequest
from .negotiation import content_type
from .preconditions import IF_MATCH_PATTERN, if_match
from .queries import split_query
from .responses import Response
from .security import needs, refuse_other_sites

READ: Final = needs(Scope.READ)
TRAIN: Final = needs(Scope.TRAIN)
ADMIN: Final = needs(Scope.ADMIN)
"""The scope that a route needs: `dependencies=[ADMIN]`. Each route that is not public has one."""

DOCUMENT_PROBLEMS: Final = ("malformed-body", "payload-too-large", "unsupported-media-type")
"""The problem types of a JSON body."""

Handler = Callable[[Request], Coroutine[Any, Any, StarletteResponse]]


class DocumentRoute(APIRoute):
    """A route with strict query parameters and, if it has a body, a strict JSON body.

    A custom route class, as in FastAPI's guide "Custom Request and APIRoute class". Its handler raises:

        Forbidden: a web page of another site sends it, and it may change something.
        InvalidRequest: a query parameter is unknown or repeated; a field of the body is unknown, missing or invalid.
        UnsupportedMediaType: the Content-Type is not JSON.
        PayloadTooLarge: the body is larger than `ApiOptions.max_body_bytes`.
        MalformedBody: the body is not valid JSON.
    """

    def get_route_handler(self) -> Handler:
        """FastAPI's handler, preceded by these checks."""
        handle = super().get_route_handler()
        known = {field.alias: field.field_info.annotation for field in self.dependant.query_params}
        body = self.body_field.field_info if self.body_field else None
        types = (JSON, MERGE_PATCH_JSON) if "PATCH" in (self.methods or ()) else (JSON,)
        changes = self.methods != {"GET"}

        async def read_and_handle(request: Request) -> StarletteResponse:
            if changes:
                refuse_other_sites(read_headers(request.scope["headers"]))
            if request.scope["query_string"]:
                split_query(request.scope["query_string"], known)
            if body is not None:
                model: Any = body.annotation
                request = await _read_document(request, model, types, required=body.is_required())
            return await handle(request)

        return read_and_handle


class _DocumentRequest(Request):
    """A request whose body was parsed and validated; FastAPI gets the model from `json()`."""

    def __init__(self, request: Request, document: BaseModel | None) -> None:
        super().__init__(request.scope, request.receive)
        self._document = document

    async def body(self) -> bytes:
        return b"" if self._document is None else b"{}"

    async def json(self) -> BaseModel | None:
        return self._document


async def _read_document(
    request: Request, model: type[BaseModel], types: tuple[str, ...], *, required: bool
) -> _DocumentRequest:
    headers = read_headers(request.scope["headers"])
    if required:
        content_type(headers, types)  # before the body is read
    body = await read_body(headers, request.receive, request.app.state.options.max_body_bytes)
    if not (body or required):
        return _DocumentRequest(request, None)
    content_type(headers, types)
    document = await request.app.state.layers.decode(len(body), parse_document, model, body)
    return _DocumentRequest(request, document)


def document_router(tag: str) -> APIRouter:
    """A router for JSON documents; `tag` is its section in the API documentation."""
    return APIRouter(route_class=DocumentRoute, tags=[tag])


def tensor_router(tag: str = "layers") -> APIRouter:
    """A router for operations with tensors, whose media types are described by `tensor_content`."""
    return APIRouter(tags=[tag], default_response_class=StarletteResponse)


async def call_endpoint(name: str, request: Request) -> Response:
    """The response of the endpoint that is registered for this method and route.

    The gateway calls endpoints without FastAPI. Their FastAPI routes exist for the OpenAPI document, HEAD and 405, and
    call the same endpoints.
    """
    scope = request.scope
    endpoint: Endpoint = request.app.state.endpoints[scope["method"], scope["route"].path]
    headers, version = read_headers(scope["headers"]), scope["path_params"].get("version")
    grant: Grant = request.state.grant
    return await endpoint(
        LayerRequest(
            name,
            scope["query_string"],
            headers,
            request.receive,
            grant=grant,
            version=version,
            request_id=request.state.request_id,
        )
    )


async def _layers(request: Request) -> Layers:
    layers: Layers = request.app.state.layers
    return layers


async def _grant(request: Request) -> Grant:
    grant: Grant = request.state.grant
    return grant


async def _if_match(
    given: Annotated[
        str | None,
        Header(
            alias="If-Match",
            description='only at these versions, such as `"7"`',
            json_schema_extra={"pattern": IF_MATCH_PATTERN},
        ),
    ] = None,
) -> frozenset[int | str] | None:
    return if_match(given)


async def _idempotency_key(
    request: Request,
    _given: Annotated[
        str | None,
        Header(
            alias=IDEMPOTENCY_KEY,
            description="makes a repeat of the same call harmless, as long as its receipt is kept",
            json_schema_extra={"pattern": f"^{KEY_PATTERN.pattern}$"},
        ),
    ] = None,
) -> str | None:
    return idempotency_key(read_headers(request.scope["headers"]))


LayerName = Annotated[str, Path(pattern=f"^{LAYER_NAME_PATTERN.pattern}$", description="the layer's name")]
LayersDependency = Annotated[Layers, Depends(_layers)]
GrantDependency = Annotated[Grant, Depends(_grant)]
"""What the caller may do."""
IfMatch = Annotated[frozenset[int | str] | None, Depends(_if_match)]
"""The versions and tags of states that satisfy If-Match; None for any."""
IfNoneMatch = Annotated[str | None, Header(alias="If-None-Match", description="304 at these versions")]
IdempotencyKey = Annotated[str | None, Depends(_idempotency_key)]
