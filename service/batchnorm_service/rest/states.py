"""Routes for the tensors of several layers in one safetensors file: a whole model in one call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final

import orjson
from fastapi import Query
from starlette.requests import Request
from starlette.responses import JSONResponse

from batchnorm_client.wire.documents import ManyReplaced
from batchnorm_client.wire.errors import InvalidRequest, PayloadTooLarge, ProblemError, shown
from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_client.wire.names import check_layer_name
from batchnorm_client.wire.tensors import MANY_LAYERS_HEADER, Tensor, decode_safetensors
from batchnorm_service.layers import MAX_LAYERS, Done, Layers, LayerStates, Selection, layer_not_found

from .layer_request import LayerRequest
from .negotiation import accepted, content_type
from .openapi import BINARY, describe_responses
from .preconditions import if_match, known_tags, state_etag
from .problems import problem_document
from .queries import NoQuery, StatesQuery, parse_query
from .responses import Response, respond_empty, respond_json
from .routes import READ, TRAIN, IfMatch, IfNoneMatch, call_endpoint, tensor_router
from .target import STATES
from .waiting import VARY, find_states, respond_once

_FORMS: Final = (SAFETENSORS,)
_FILE: Final[dict[str, Any]] = {
    SAFETENSORS: {
        "schema": {
            **BINARY,
            "description": "A safetensors file with tensors named `<layer>.<tensor>`, such as"
            " `layer1.0.bn1.running_mean`; in its metadata, `versions` is a JSON object of the layers' versions,"
            " and, of GET, `configs` one of their configs",
        }
    }
}

router = tensor_router("state")


@router.get(
    STATES,
    dependencies=[READ],
    summary="The tensors of several layers",
    responses=describe_responses(
        "The tensors",
        "ETag",
        content=_FILE,
        unchanged=True,
        problems=("layer-not-found", "not-acceptable", "payload-too-large"),
    ),
)
async def get_states(
    request: Request, _query: Annotated[StatesQuery, Query()], _if_none_match: IfNoneMatch = None
) -> Response:
    """Each layer is as fresh as in eval, not all of one moment.

    Layers named by module paths make a torch state_dict. With `wait` and If-None-Match, the response comes when there
    is another state of one of the layers, or other layers.
    """
    return await call_endpoint("", request)


async def read_states(layers: Layers, max_body_bytes: int, request: LayerRequest) -> Response:
    """The endpoint of `get_states`; without FastAPI, because clients that normalize locally call it for every batch."""
    query = parse_query(StatesQuery, request.query)
    accepted(request.headers.get(b"accept"), _FORMS)
    known = known_tags(request.headers.get(b"if-none-match"))
    selection = _selection(request, query)
    found = await find_states(layers, request, selection, known, query.wait)
    headers = [(b"etag", state_etag(found.tags[0])), *VARY]
    if found.states is None or found.known:
        return respond_empty(304, headers)
    return await respond_once(
        layers, found.states, STATES, partial(_respond, layers, found.states, max_body_bytes, headers)
    )


async def _respond(
    layers: Layers, states: LayerStates, max_body_bytes: int, headers: list[tuple[bytes, bytes]]
) -> Response:
    return Response(200, SAFETENSORS, await layers.states.file(states, max_body_bytes), headers)


def _selection(request: LayerRequest, query: StatesQuery) -> Selection:
    grant = request.grant
    if query.prefix is not None:
        visible = grant.visible_prefix(query.prefix)
        return Selection(prefix="-" if visible is None else visible)  # no name starts with a hyphen
    names = (query.names or "").split(",")
    for name in names:
        check_layer_name(name)
        if not grant.sees(name):
            raise layer_not_found(name)
    distinct = sorted(set(names))
    if len(distinct) < len(names):
        raise InvalidRequest("names: a name is given more than once", field="names", expected="each name once")
    return Selection(tuple(distinct))


@router.put(
    STATES,
    dependencies=[TRAIN],
    summary="Replace tensors of several layers",
    response_model=ManyReplaced,
    response_class=JSONResponse,
    responses=describe_responses(
        "One result or problem for each layer",
        problems=(
            "malformed-body",
            "layer-not-found",
            "version-mismatch",
            "payload-too-large",
            "unsupported-media-type",
            "dtype-mismatch",
        ),
    ),
    openapi_extra={"requestBody": {"required": True, "content": _FILE}},
)
async def replace_states(request: Request, _if_match: IfMatch) -> Response:
    """Tensors that are not in the file stay unchanged. Atomic per layer, not over all.

    `versions` in the file's metadata are If-Match, layer by layer; a header If-Match is for all layers of the file.
    """
    return await call_endpoint("", request)


async def write_states(layers: Layers, max_body_bytes: int, request: LayerRequest) -> Response:
    """The endpoint of `replace_states`; without FastAPI, because an optimizer's step calls it."""
    parse_query(NoQuery, request.query)
    given = request.headers.get(b"if-match")
    expected = if_match(None if given is None else given.decode("latin-1"))
    content_type(request.headers, _FORMS)
    body = request.received or await request.body(max_body_bytes)
    by_layer, versions = await layers.decode(len(body), _read_file, body)
    valid: dict[str, Mapping[str, Tensor]] = {}
    results: dict[str, Done | Exception] = {}
    for name, tensors in by_layer.items():
        try:
            check_layer_name(name)
            if not request.grant.sees(name):
                raise layer_not_found(name)
            valid[name] = tensors
        except ProblemError as error:
            results[name] = error
    results |= await layers.states.replace_many(valid, versions, expected)
    documents = {name: _result(name, results[name], request.request_id) for name in by_layer}
    return respond_json(200, {"layers": documents})


def _result(name: str, result: Done | Exception, request_id: str) -> dict[str, Any]:
    if isinstance(result, Exception):
        return problem_document(result, f"/v1/layers/{name}/state", request_id)
    return {"version": result.version, "num_batches_tracked": result.batch}


def _read_file(body: bytes | bytearray | memoryview) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """The tensors and the expected versions by layer. A layer with a version has an entry, also without tensors."""
    tensors, metadata = decode_safetensors(body, max_header=MANY_LAYERS_HEADER, repeated=True)
    by_layer: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        layer, dot, name = path.rpartition(".")
        if not dot:
            raise InvalidRequest(
                f"the tensor {shown(path)} names no layer", field=path[:200], expected="<layer>.<tensor>"
            )
        by_layer.setdefault(layer, {})[name] = tensor
    versions = _read_versions(metadata.get("versions", "{}"))
    for layer in versions:
        by_layer.setdefault(layer, {})
    if not by_layer:
        raise InvalidRequest("the file has no tensor", field="state", expected="<layer>.<tensor>")
    if len(by_layer) > MAX_LAYERS:
        raise PayloadTooLarge(f"at most {MAX_LAYERS} layers in one call", expected=MAX_LAYERS, got=len(by_layer))
    return by_layer, versions


def _read_versions(text: str) -> dict[str, int]:
    try:
        versions = orjson.loads(text)
    except orjson.JSONDecodeError:
        versions = None
    if not isinstance(versions, dict) or not all(type(version) is int for version in versions.values()):
        raise InvalidRequest(
            "versions in the file's metadata must be a JSON object of versions by layer name",
            field="__metadata__.versions",
            expected='{"<layer>": <version>}',
            got=text[:200],
        )
    return versions
