"""Inference: normalizes a batch in eval or in train mode."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from time import perf_counter_ns
from typing import Any, Final

from starlette.requests import Request

from batchnorm_client.wire.errors import InvalidRequest
from batchnorm_client.wire.headers import DIGEST, IDEMPOTENT_REPLAY, NUM_BATCHES_TRACKED, VERSION
from batchnorm_client.wire.media_types import JSON
from batchnorm_client.wire.names import check_state_name
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.layers import Layers, Normalized
from batchnorm_service.layers.batches import Read
from batchnorm_service.rest.headers import idempotency_key
from batchnorm_service.rest.layer_request import Body, LayerRequest
from batchnorm_service.rest.normalize import normalized_headers
from batchnorm_service.rest.openapi import describe_responses, ref
from batchnorm_service.rest.queries import NoQuery, parse_query
from batchnorm_service.rest.responses import Response, text_bytes
from batchnorm_service.rest.routes import READ, IdempotencyKey, LayerName, call_endpoint, tensor_router
from batchnorm_service.rest.security import require
from batchnorm_service.rest.sizes import check_elements
from batchnorm_service.rest.target import MODEL, MODEL_VERSION
from batchnorm_service.tokens import Scope

from .codec import HEADER_LENGTH, InferenceCall, header_length, read_raw, read_request, write_response
from .documents import INPUT, InferenceResponse
from .forms import OCTET_STREAM, check_form
from .models import Version, model_shape, state_of
from .statistics import Statistics

_HEADER_LENGTH: Final = HEADER_LENGTH.lower().encode()


class InferEndpoint:
    """The endpoint infer.

    Args:
        layers: normalizes and folds.
        statistics: counts the requests.
        max_body_bytes: larger request bodies are refused.
        max_elements: larger batches are refused; see `check_elements`.
    """

    def __init__(self, layers: Layers, statistics: Statistics, max_body_bytes: int, max_elements: int) -> None:
        self._layers = layers
        self._statistics = statistics
        self._max_body_bytes = max_body_bytes
        self._max_elements = max_elements

    async def infer(self, request: LayerRequest) -> Response:
        """Normalize a batch, by default with the running statistics."""
        parse_query(NoQuery, request.query)
        check_form(request.headers)
        key, length = idempotency_key(request.headers), header_length(request.headers)
        body = request.received or await request.body(self._max_body_bytes)
        began, exists = perf_counter_ns(), False

        def read(_: Mapping[str, str]) -> dict[str, Tensor]:
            nonlocal exists
            exists = True  # tensors are read for a layer that was found
            return {INPUT: call.tensor}

        try:
            call = await self._read(request, body, length)
            check_elements(call.tensor, self._max_elements, (JSON,) if call.text else (), field=INPUT)
            was_read = perf_counter_ns()
            done = await self._normalize(request, call, read, key)
            computed = perf_counter_ns()
            size = 0 if call.binary else text_bytes(JSON, (done.output,))
            response = await self._layers.encode(size, _respond, request.name, call, done)
        except Exception:
            self._statistics.fail(request.name, perf_counter_ns() - began, exists=exists)
            raise
        rows = call.tensor.shape[0] if call.tensor.shape else 0
        self._statistics.succeed(request.name, rows, (began, was_read, computed, perf_counter_ns()))
        return response

    async def _read(self, request: LayerRequest, body: Body, length: int | None) -> InferenceCall:
        if length == 0:
            config = (await self._layers.get(request.name, _state(request.version, None))).config
            return read_raw(body, config.dtype, model_shape(config))
        # Bytes that do not begin at a multiple of their size are copied.
        size = length if length is not None and length % 8 == 0 else len(body)
        return await self._layers.decode(size, read_request, body, length)

    async def _normalize(self, request: LayerRequest, call: InferenceCall, read: Read, key: str | None) -> Normalized:
        parameters = call.request.parameters
        at = _state(request.version, parameters.at)
        if parameters.mode == "eval":
            return await self._layers.batches.eval(request.name, read, at=at)
        require(request.grant, Scope.TRAIN)
        if at is not None:
            raise InvalidRequest(
                "parameters.mode: only the newest state can be trained, not a version or tag",
                field="parameters.mode",
                expected="eval",
                got="train",
            )
        return await self._layers.batches.train(request.name, read, key)


def _state(version: str | None, at: int | str | None) -> int | str | None:
    """The version or tag that the path or the parameter names; None for the newest."""
    if version is not None and at is not None:
        raise InvalidRequest(
            "parameters.at: the path names a version already", field="parameters.at", expected="no value", got=at
        )
    named = at if version is None else version
    if named is not None:
        check_state_name(str(named))
    return state_of(named)


def _respond(name: str, call: InferenceCall, done: Normalized) -> Response:
    parameters: dict[str, Any] = {"num_batches_tracked": done.num_batches_tracked}
    if done.replayed:
        parameters["idempotent_replay"] = True
    document: dict[str, Any] = {"model_name": name, "model_version": str(done.version), "parameters": parameters}
    if call.id is not None:
        document["id"] = call.id
    pieces, length = write_response(call, document, done.output)
    headers = normalized_headers(done)
    if length is None:
        return Response(200, JSON, pieces, headers)
    headers.append((_HEADER_LENGTH, b"%d" % length))
    return Response(200, OCTET_STREAM, pieces, headers)


_BINARY: Final = {
    "type": "string",
    "format": "binary",
    "description": f"a JSON object of as many bytes as {HEADER_LENGTH} says, then the bytes of tensors",
}
_REQUEST: Final = {
    "requestBody": {
        "required": True,
        "content": {JSON: {"schema": ref("InferenceRequest")}, OCTET_STREAM: {"schema": _BINARY}},
    }
}
_RESPONSES: Final = partial(
    describe_responses,
    "The normalized batch",
    *("ETag", VERSION, NUM_BATCHES_TRACKED, DIGEST, IDEMPOTENT_REPLAY),
    content={JSON: {"schema": ref("InferenceResponse")}, OCTET_STREAM: {"schema": _BINARY}},
)
_PROBLEMS: Final = (
    "malformed-body",
    "layer-not-found",
    "version-not-found",
    "payload-too-large",
    "unsupported-media-type",
    "shape-mismatch",
    "dtype-mismatch",
    "too-few-values",
    "non-finite",
    "device-unavailable",
)

router = tensor_router("open inference protocol")


@router.post(
    f"{MODEL}/infer",
    dependencies=[READ],
    summary="Normalize a batch",
    response_model=InferenceResponse,
    responses=_RESPONSES(problems=(*_PROBLEMS, "idempotency-key-reused")),
    openapi_extra=_REQUEST,
)
async def infer(name: LayerName, request: Request, _key: IdempotencyKey) -> Response:
    """With the parameter `mode: train`, which needs the scope `train`, as train does; by default, as eval does."""
    return await call_endpoint(name, request)


@router.post(
    f"{MODEL_VERSION}/infer",
    dependencies=[READ],
    summary="Normalize a batch with a kept state",
    response_model=InferenceResponse,
    responses=_RESPONSES(problems=_PROBLEMS),
    openapi_extra=_REQUEST,
)
async def infer_with_version(name: LayerName, version: Version, request: Request) -> Response:
    """As eval does with `?at=`."""
    return await call_endpoint(name, request)
