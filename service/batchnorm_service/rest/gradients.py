"""The endpoint for the backward pass, for clients that keep no autograd graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

from fastapi import Query
from starlette.requests import Request

from batchnorm_client.wire.headers import IDEMPOTENT_REPLAY, VERSION
from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.tensors import Tensor, bytes_read, decode, encode
from batchnorm_service.layers import Layers
from batchnorm_service.tokens import Scope

from .headers import idempotency_key
from .layer_request import LayerRequest
from .negotiation import accepted, content_type
from .openapi import describe_responses, ref, tensor_body, tensor_content
from .preconditions import etag
from .queries import BackwardQuery, parse_query
from .responses import REPLAYED, Response, text_bytes
from .routes import READ, IdempotencyKey, LayerName, call_endpoint, tensor_router
from .security import require
from .sizes import check_elements

_FORMS: Final = {JSON: (JSON, SAFETENSORS), SAFETENSORS: (SAFETENSORS, JSON)}
_GRADIENTS: Final = ("grad_input", "grad_weight", "grad_bias")


class GradientEndpoint:
    """Endpoint of the backward pass.

    Args:
        layers: computes the gradients.
        max_body_bytes: larger request bodies are refused.
        max_elements: larger batches are refused; see `check_elements`.
    """

    def __init__(self, layers: Layers, max_body_bytes: int, max_elements: int) -> None:
        self._layers = layers
        self._max_body_bytes = max_body_bytes
        self._max_elements = max_elements

    async def backward(self, request: LayerRequest) -> Response:
        """The gradients of a normalization."""
        query = parse_query(BackwardQuery, request.query)
        key, group = idempotency_key(request.headers), query.group_call
        if group is not None:  # the sums of its members are stored, and each of them gets what the others have sent
            require(request.grant, Scope.TRAIN)
        media = content_type(request.headers, tuple(_FORMS))
        form = accepted(request.headers.get(b"accept"), _FORMS[media])[0]
        body = await request.body(self._max_body_bytes)

        def read(dtypes: Mapping[str, str]) -> Mapping[str, Tensor]:
            tensors = decode(media, body, dtypes)
            for field, tensor in tensors.items():
                check_elements(tensor, self._max_elements, (media, form), field=field)
            return tensors

        call = self._layers.batches.backward(
            request.name, read, key, nbytes=bytes_read(media, body), training=query.mode == "train", group=group
        )
        done = await (request.cancel_on_disconnect(call) if group else call)
        size = text_bytes(form, done.gradients.values())
        pieces = await self._layers.encode(size, encode, form, done.gradients, {"version": done.version})
        headers = [(b"etag", etag(done.version)), (VERSION.lower().encode(), b"%d" % done.version)]
        return Response(200, form, pieces, [*headers, REPLAYED] if done.replayed else headers)


router = tensor_router()


@router.post(
    "/v1/layers/{name}/backward",
    dependencies=[READ],
    summary="The gradients of a normalization",
    responses=describe_responses(
        "The gradients",
        "ETag",
        VERSION,
        IDEMPOTENT_REPLAY,
        content=tensor_content(
            tuple(_FORMS), ref("Gradients"), f"{', '.join(_GRADIENTS)}; the last two of an affine layer"
        ),
        problems=(
            "malformed-body",
            "layer-not-found",
            "not-acceptable",
            "group-closed",
            "payload-too-large",
            "unsupported-media-type",
            "shape-mismatch",
            "dtype-mismatch",
            "too-few-values",
            "idempotency-key-reused",
            "group-mismatch",
            "device-unavailable",
            "group-incomplete",
        ),
    ),
    openapi_extra=tensor_body(tuple(_FORMS), "GradientInput", "input, grad_output"),
)
async def backward(
    name: LayerName, request: Request, _query: Annotated[BackwardQuery, Query()], _key: IdempotencyKey
) -> Response:
    """Does not change the layer. With `group`, it needs the scope `train`.

    In a group, each member gets grad_input as computed for the whole batch, and its shard's summand of grad_weight and
    grad_bias, as with SyncBatchNorm.
    """
    return await call_endpoint(name, request)
