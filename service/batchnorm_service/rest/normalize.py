"""The endpoints train, eval and inverse: they read tensors, call `Layers`, and encode the output."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Final

from fastapi import Query
from starlette.requests import Request

from batchnorm_client.wire.headers import DIGEST, IDEMPOTENT_REPLAY, NUM_BATCHES_TRACKED, VERSION
from batchnorm_client.wire.tensors import CODECS, Tensor, bytes_read, decode, encode
from batchnorm_service.layers import Layers, Normalized

from .headers import Headers, idempotency_key
from .layer_request import LayerRequest
from .negotiation import FORMS_FOR, accepted, content_type, tensor_form
from .openapi import describe_responses, ref, tensor_body, tensor_content
from .preconditions import etag
from .queries import EvalQuery, ExpectQuery, TrainQuery, parse_query
from .responses import RAW_DIGEST, REPLAYED, RawHeader, Response, text_bytes
from .routes import READ, TRAIN, IdempotencyKey, LayerName, call_endpoint, tensor_router
from .sizes import check_elements

_FORMS: Final = tuple(CODECS)
_SMALL_BODY: Final = 1 << 16
"""Bytes. Up to this size, the exact amount of codec work does not matter: it is done on the event loop."""

_VERSION: Final = VERSION.lower().encode()
_BATCHES: Final = NUM_BATCHES_TRACKED.lower().encode()


class NormalizeEndpoints:
    """Endpoints train, eval and inverse.

    Args:
        layers: normalizes and folds.
        max_body_bytes: larger request bodies are refused.
        max_elements: larger batches are refused; see `check_elements`.
    """

    def __init__(self, layers: Layers, max_body_bytes: int, max_elements: int) -> None:
        self._layers = layers
        self._batches = layers.batches
        self._max_body_bytes = max_body_bytes
        self._max_elements = max_elements

    async def train(self, request: LayerRequest) -> Response:
        """Fold a batch, and normalize it with its own statistics or, if asked for, with the running ones."""
        query = parse_query(TrainQuery, request.query)
        exchange = _TensorExchange(request.headers, self._max_elements, statistics=query.statistics == "true")
        key, group = idempotency_key(request.headers), query.group_call
        exchange.body = request.received or await request.body(self._max_body_bytes)
        name, read, nbytes, statistics = request.name, exchange.read, exchange.bytes_read, exchange.statistics
        if query.normalize == "running":
            done = await self._batches.observe(name, read, key, nbytes=nbytes, statistics=statistics)
        else:
            call = self._batches.train(name, read, key, nbytes=nbytes, statistics=statistics, group=group)
            done = await (request.cancel_on_disconnect(call) if group else call)
        return await self._layers.encode(exchange.bytes_written(done), exchange.response, done)

    async def eval(self, request: LayerRequest) -> Response:
        """Normalize a batch with the layer's running statistics."""
        query = parse_query(EvalQuery, request.query)
        exchange = _TensorExchange(request.headers, self._max_elements, statistics=query.statistics == "true")
        exchange.body = request.received or await request.body(self._max_body_bytes)
        done = await self._batches.eval(
            request.name,
            exchange.read,
            nbytes=exchange.bytes_read,
            statistics=exchange.statistics,
            at=query.state,
            expect=query.expect,
        )
        return await self._layers.encode(exchange.bytes_written(done), exchange.response, done)

    async def inverse(self, request: LayerRequest) -> Response:
        """Undo what eval does to a batch."""
        query = parse_query(ExpectQuery, request.query)
        exchange = _TensorExchange(request.headers, self._max_elements, statistics=False)
        exchange.body = request.received or await request.body(self._max_body_bytes)
        done = await self._batches.inverse(
            request.name, exchange.read, nbytes=exchange.bytes_read, at=query.state, expect=query.expect
        )
        return await self._layers.encode(exchange.bytes_written(done), exchange.response, done)


class _TensorExchange:
    """Codec of one request and its response: the negotiated media types, and the body."""

    __slots__ = ("_accepted", "_form", "_max_elements", "_media", "body", "statistics")

    def __init__(self, headers: Headers, max_elements: int, *, statistics: bool) -> None:
        self.statistics = statistics
        self.body: bytearray | memoryview = bytearray()
        self._max_elements = max_elements
        self._media = content_type(headers, _FORMS)
        self._accepted = accepted(headers.get(b"accept"), FORMS_FOR[self._media])
        self._form = self._media

    @property
    def bytes_read(self) -> int:
        """How many bytes decoding has to process (a binary body is viewed, not copied); the size of a small body."""
        size = len(self.body)
        return size if size <= _SMALL_BODY else bytes_read(self._media, self.body)

    def bytes_written(self, done: Normalized) -> int:
        """About how many bytes encoding has to write as text; the size of the request's body if that is small."""
        size = len(self.body)
        return size if size <= _SMALL_BODY else text_bytes(self._form, (done.output, *done.statistics.values()))

    def read(self, dtypes: Mapping[str, str]) -> Mapping[str, Tensor]:
        """The client's tensors. Also chooses the response's media type, to refuse the request before it is folded."""
        tensors = decode(self._media, self.body, dtypes)
        if (batch := tensors.get("input")) is not None:
            self._form = tensor_form(self._accepted, batch.dtype, self.statistics)  # the output has the same dtype
            check_elements(batch, self._max_elements, (self._media, self._form), field="input")
        return tensors

    def response(self, done: Normalized) -> Response:
        """The response, in the media type that `read` chose."""
        fields = {"version": done.version, "num_batches_tracked": done.num_batches_tracked}
        pieces = encode(self._form, {"output": done.output, **done.statistics}, fields)
        return Response(200, self._form, pieces, normalized_headers(done))


def normalized_headers(done: Normalized) -> list[RawHeader]:
    """The headers of a response with a normalized batch."""
    headers: list[RawHeader] = [
        (b"etag", etag(done.version)),
        (_VERSION, b"%d" % done.version),
        (_BATCHES, b"%d" % done.num_batches_tracked),
    ]
    if done.replayed:
        headers.append(REPLAYED)
    if done.digest is not None:
        headers.append((RAW_DIGEST, done.digest.encode()))
    return headers


_PROBLEMS: Final = (
    "malformed-body",
    "layer-not-found",
    "not-acceptable",
    "payload-too-large",
    "unsupported-media-type",
    "shape-mismatch",
    "dtype-mismatch",
    "too-few-values",
    "non-finite",
    "device-unavailable",
)
_GROUP_PROBLEMS: Final = ("idempotency-key-reused", "group-closed", "group-mismatch", "group-incomplete")
_STATE_PROBLEMS: Final = ("version-not-found", "digest-mismatch")
_BATCH: Final = tensor_body(_FORMS, "InputBatch", "input")
_TAGS: Final = ("ETag", VERSION, NUM_BATCHES_TRACKED)
_OUTPUT: Final = partial(
    describe_responses,
    "The normalized batch, in the form that Accept names; by default in the request's",
    content=tensor_content(
        _FORMS,
        ref("NormalizedBatch"),
        "output, and with statistics=true batch_mean, batch_var, batch_invstd",
    ),
)

router = tensor_router()


@router.post(
    "/v1/layers/{name}/train",
    dependencies=[TRAIN],
    summary="Normalize with the batch's statistics, and fold them into the running ones",
    responses=_OUTPUT(*_TAGS, IDEMPOTENT_REPLAY, problems=(*_PROBLEMS, *_GROUP_PROBLEMS)),
    openapi_extra=_BATCH,
)
async def train(
    name: LayerName, request: Request, _query: Annotated[TrainQuery, Query()], _key: IdempotencyKey
) -> Response:
    """Responds after the commit. A batch is folded exactly once per Idempotency-Key.

    With `normalize=running` it is normalized with the running statistics right after its own fold, as VecNormalize of
    stable-baselines3 does; a repeat under its key, with the newest ones.
    """
    return await call_endpoint(name, request)


@router.post(
    "/v1/layers/{name}/eval",
    dependencies=[READ],
    name="eval",
    summary="Normalize with the running statistics",
    responses=_OUTPUT(*_TAGS, DIGEST, problems=(*_PROBLEMS, *_STATE_PROBLEMS)),
    openapi_extra=_BATCH,
)
async def eval_(name: LayerName, request: Request, _query: Annotated[EvalQuery, Query()]) -> Response:
    """Uses the newest committed state and does not change it. A batch may be empty."""
    return await call_endpoint(name, request)


@router.post(
    "/v1/layers/{name}/inverse",
    dependencies=[READ],
    summary="Undo eval's normalization",
    responses=_OUTPUT(*_TAGS, DIGEST, problems=(*_PROBLEMS, *_STATE_PROBLEMS)),
    openapi_extra=_BATCH,
)
async def inverse(name: LayerName, request: Request, _query: Annotated[ExpectQuery, Query()]) -> Response:
    """Like scikit-learn's inverse_transform. Values that `clip` bounded are not restored."""
    return await call_endpoint(name, request)
