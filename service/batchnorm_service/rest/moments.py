"""Endpoints that fold moments instead of batches, one or a stack of them: of one layer, and of many layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final

from fastapi import Query
from starlette.requests import Request
from starlette.responses import JSONResponse

from batchnorm_client.wire.documents import FoldedDocument, ManyFolded
from batchnorm_client.wire.errors import InvalidRequest, MalformedBody, ProblemError, shown
from batchnorm_client.wire.headers import IDEMPOTENT_REPLAY
from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.names import check_layer_name
from batchnorm_client.wire.tensors import Tensor, decode, decode_safetensors, json_pieces, json_tensors, load_json
from batchnorm_service.layers import MOMENT_DTYPES, Folded, Layers, layer_not_found

from .headers import idempotency_key
from .layer_request import LayerRequest
from .many import read_each_layer
from .negotiation import content_type
from .openapi import describe_responses, tensor_body
from .preconditions import etag
from .problems import problem_document
from .queries import MomentsQuery, NoQuery, parse_query
from .responses import REPLAYED, Response, respond_json, text_bytes
from .routes import TRAIN, IdempotencyKey, LayerName, call_endpoint, tensor_router
from .target import MOMENTS

_FORMS: Final = (JSON, SAFETENSORS)
_MOMENTS: Final = ("count", "mean", "var")
_MAX_LAYERS: Final = 10_000
_LARGE: Final = 1 << 16
"""Bytes. Larger JSON is parsed layer by layer: one call of the parser would hold the GIL long."""

_PROBLEMS: Final = ("malformed-body", "payload-too-large", "unsupported-media-type")

Moments = Mapping[str, Tensor] | ProblemError
"""A layer's count, mean and var, or why they cannot be read."""


class MomentsEndpoints:
    """Endpoints that fold moments into one layer, or into many.

    Args:
        layers: folds the moments.
        max_body_bytes: larger request bodies are refused.
    """

    def __init__(self, layers: Layers, max_body_bytes: int) -> None:
        self._layers = layers
        self._batches = layers.batches
        self._max_body_bytes = max_body_bytes

    async def fold(self, request: LayerRequest) -> Response:
        """Fold the moments of a batch that the client keeps, or of a stack of batches."""
        group = parse_query(MomentsQuery, request.query).group_call
        key = idempotency_key(request.headers)
        media = content_type(request.headers, _FORMS)
        body = request.received or await request.body(self._max_body_bytes)
        read = partial(decode, media, body)
        call = self._batches.fold_moments(request.name, read, key, nbytes=len(body), group=group)
        done = await (request.cancel_on_disconnect(call) if group else call)
        return await self._layers.encode(text_bytes(JSON, done.moments.values()), _respond, done)

    async def fold_many(self, request: LayerRequest) -> Response:
        """Fold the moments of many layers; each layer's all or none, with a result or a problem of its own."""
        parse_query(NoQuery, request.query)
        key = idempotency_key(request.headers)
        media = content_type(request.headers, _FORMS)
        body = request.received or await request.body(self._max_body_bytes)
        by_layer = await self._layers.decode(len(body), _READERS[media], body)
        valid: dict[str, Moments] = {}
        results: dict[str, Any] = {}
        for name, moments in by_layer.items():
            try:
                check_layer_name(name)
                if not request.grant.sees(name):
                    raise layer_not_found(name)
                valid[name] = moments
            except ProblemError as error:
                results[name] = _result_document(name, error, request.request_id)
        for name, result in (await self._batches.fold_many(valid, key)).items():
            results[name] = _result_document(name, result, request.request_id)
        return respond_json(200, {"layers": {name: results[name] for name in by_layer}})


def _respond(done: Folded) -> Response:
    document = _document(done)
    if done.count is not None:
        document |= {"count": done.count, **done.moments}
    replayed = [REPLAYED] if done.replayed else []
    return Response(200, JSON, json_pieces(document), [(b"etag", etag(done.version)), *replayed])


def _document(done: Folded) -> dict[str, Any]:
    document = {"version": done.version, "num_batches_tracked": done.num_batches_tracked}
    return document if done.rows is None else document | {"folded": done.rows}


def _result_document(name: str, result: Folded | Exception, request_id: str) -> dict[str, Any]:
    if isinstance(result, Exception):
        return problem_document(result, f"/v1/layers/{name}/moments", request_id)
    return _document(result) | {"replayed": result.replayed}


def _many_from_json(body: bytes | bytearray | memoryview) -> Mapping[str, Moments]:
    if len(body) >= _LARGE and (each := read_each_layer(body, _MAX_LAYERS)) is not None:
        return each
    try:
        document = load_json(body)
    except InvalidRequest:  # a number that does not fit is the fault of one layer
        if (each := read_each_layer(body, _MAX_LAYERS)) is not None:
            return each
        raise
    if not isinstance(document, dict):
        raise MalformedBody('the body must be an object {"layers": {name: {"count", "mean", "var"}}}')
    for field in document:
        if field != "layers":
            raise InvalidRequest(
                f"{shown(field)} is not known; known is layers", field=field[:200], expected=["layers"]
            )
    layers = document.get("layers")
    if not isinstance(layers, dict):
        raise InvalidRequest("layers: must be an object of moments by layer name", field="layers", expected="an object")
    return {name: _from_json(moments) for name, moments in _bounded(layers).items()}


def _from_json(document: Any) -> Moments:
    """The moments of one layer, parsed as in `POST /v1/layers/{name}/moments`."""
    try:
        return json_tensors(document, MOMENT_DTYPES)
    except ProblemError as error:
        return error


def _many_from_safetensors(body: bytes | bytearray | memoryview) -> Mapping[str, Moments]:
    tensors, _ = decode_safetensors(body, repeated=True)
    layers: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        layer, _, name = path.rpartition("/" if "/" in path else ".")  # no layer's name has a slash
        if name not in _MOMENTS:
            raise InvalidRequest(
                f"the tensor {shown(path)} is not known", field=path[:200], expected="{layer}.count, mean or var"
            )
        if name in layers.setdefault(layer, {}):
            raise InvalidRequest(
                f"{name} of {shown(layer)} is given twice, with a dot and with a slash",
                field=path[:200],
                expected="one of them",
            )
        layers[layer][name] = tensor
    return dict(_bounded(layers))


def _bounded(layers: dict[str, Any]) -> dict[str, Any]:
    if len(layers) > _MAX_LAYERS:
        raise InvalidRequest(
            f"layers: at most {_MAX_LAYERS} in one call", field="layers", expected=_MAX_LAYERS, got=len(layers)
        )
    return layers


_READERS: Final = {JSON: _many_from_json, SAFETENSORS: _many_from_safetensors}
router = tensor_router()


@router.post(
    "/v1/layers/{name}/moments",
    dependencies=[TRAIN],
    summary="Fold the moments of a batch that the client keeps, or of a stack of batches",
    response_model=FoldedDocument,
    response_class=JSONResponse,
    responses=describe_responses(
        "Folded; `folded` only for a stack; count, mean and var only for a group",
        "ETag",
        IDEMPOTENT_REPLAY,
        problems=(
            *_PROBLEMS,
            "layer-not-found",
            "group-closed",
            "shape-mismatch",
            "dtype-mismatch",
            "too-few-values",
            "non-finite",
            "idempotency-key-reused",
            "group-mismatch",
            "group-incomplete",
        ),
    ),
    openapi_extra=tensor_body(_FORMS, "MomentsDocument", ", ".join(_MOMENTS)),
)
async def fold_moments(
    name: LayerName, request: Request, _query: Annotated[MomentsQuery, Query()], _key: IdempotencyKey
) -> Response:
    """`count` is values per channel, `var` is biased. A group's response has count, mean and var of all shards.

    A stack is `count` (M,), `mean` and `var` (M, C), of at most 65,536 batches. They are folded in this order, in one
    commit with one receipt, all or none. A refusal says which row is wrong, counted from 0, in its field `row`.
    """
    return await call_endpoint(name, request)


@router.post(
    MOMENTS,
    dependencies=[TRAIN],
    summary="Fold the moments of many layers",
    response_model=ManyFolded,
    response_class=JSONResponse,
    responses=describe_responses("One result or problem for each layer", problems=_PROBLEMS),
    openapi_extra=tensor_body(
        _FORMS, "ManyMoments", "count, mean and var of each layer, named {layer}.count and so on"
    ),
)
async def fold_many_moments(request: Request, _key: IdempotencyKey) -> Response:
    """Atomic per layer, not over all. An Idempotency-Key applies per layer: a retry folds only those that failed.

    Each layer's moments may be a stack, as in `POST /v1/layers/{name}/moments`.
    """
    return await call_endpoint("", request)
