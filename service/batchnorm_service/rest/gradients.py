"""The backward pass, for callers that keep no autograd graph."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI
from starlette.requests import Request

from batchnorm_client.wire.headers import IDEMPOTENCY_KEY, IDEMPOTENT_REPLAY, VERSION
from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.tensors import Tensor, bytes_read, decode, encode
from batchnorm_service.layers import Layers

from .bodies import read_body
from .disconnects import unless_gone
from .headers import idempotency_key, read_headers
from .negotiation import accepted, content_type
from .openapi import LayerNamePath, describe, ref, tensor_body, tensor_content, tensors_response
from .preconditions import etag
from .queries import BackwardQuery, parse_query
from .responses import REPLAYED, Response, text_bytes
from .sizes import check_elements

_FORMS = {JSON: (JSON, SAFETENSORS), SAFETENSORS: (SAFETENSORS, JSON)}
_GRADIENTS = ("grad_input", "grad_weight", "grad_bias")
_CONTENT = tensor_content(tuple(_FORMS), ref("Gradients"), f"{', '.join(_GRADIENTS)}; the last two of an affine layer")


def add_gradient_routes(app: FastAPI, layers: Layers, max_body_bytes: int, max_elements: int) -> None:
    """The backward pass, as a route of `app`."""

    @app.post(
        "/v1/layers/{name}/backward",
        **describe(
            "backward",
            "The gradients of a normalization",
            query=BackwardQuery,
            headers=(IDEMPOTENCY_KEY,),
            body=tensor_body(tuple(_FORMS), "GradientInput", "input, grad_output"),
            answers={200: tensors_response("The gradients", _CONTENT, ("ETag", VERSION, IDEMPOTENT_REPLAY))},
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
    )
    async def backward(name: LayerNamePath, request: Request) -> Response:
        """Changes nothing.

        A group's members get the gradient of the whole batch for their shard, and their shard's part of the
        parameters' gradients, as with SyncBatchNorm.
        """
        query = parse_query(BackwardQuery, request.scope["query_string"])
        headers = read_headers(request.scope["headers"])
        key = idempotency_key(headers)
        media = content_type(headers, tuple(_FORMS))
        form = accepted(headers.get(b"accept"), _FORMS[media])[0]
        body = await read_body(headers, request.receive, max_body_bytes)

        def read(dtypes: Mapping[str, str]) -> Mapping[str, Tensor]:
            tensors = decode(media, body, dtypes)
            for field, tensor in tensors.items():
                check_elements(tensor, max_elements, json=JSON in (media, form), field=field)
            return tensors

        call = layers.batches.backward(
            name,
            read,
            key,
            nbytes=bytes_read(media, body),
            training=query.mode == "train",
            group=query.group_call,
        )
        done = await (unless_gone(request.receive, call) if query.group_call else call)
        fields = {"version": done.version} if form == JSON else {}
        answer_headers = [(b"etag", etag(done.version)), (VERSION.lower().encode(), b"%d" % done.version)]
        if done.replayed:
            answer_headers.append(REPLAYED)
        size = text_bytes(form, done.gradients.values())
        return Response(200, form, await layers.run_codec(size, encode, form, done.gradients, fields), answer_headers)
