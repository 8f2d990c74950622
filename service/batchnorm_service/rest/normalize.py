"""Train and eval, the hot calls, and inverse: from headers and a body to an answer, without a framework in between.

`Gateway` calls these before FastAPI's router is reached. FastAPI has the same as routes, for its OpenAPI document
and its 405; they lead here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import Receive

from batchnorm_client.wire.errors import ProblemError
from batchnorm_client.wire.headers import IDEMPOTENCY_KEY, NUM_BATCHES_TRACKED, VERSION
from batchnorm_client.wire.media_types import JSON, TENSOR_MEDIA_TYPES
from batchnorm_client.wire.tensors import Tensor, bytes_read, decode, encode
from batchnorm_service.layers import Layers, Normalized, Training

from .bodies import read_body
from .disconnects import unless_gone
from .headers import Headers, idempotency_key, read_headers
from .negotiation import FORMS_FOR, accepted, content_type, tensor_form
from .openapi import LayerNamePath, describe, tensor_body, tensor_response
from .preconditions import etag
from .queries import NoQuery, NormalizeQuery, TrainQuery, parse_query
from .responses import REPLAYED, RawHeader, Response, text_bytes
from .sizes import check_elements

Encode = Callable[[Normalized], Response]
"""Writes an answer in the form that the caller takes."""

_VERSION: Final = VERSION.lower().encode()
_BATCHES: Final = NUM_BATCHES_TRACKED.lower().encode()


class NormalizeCalls:
    """Train and eval over HTTP.

    Args:
        layers: what does the work.
        max_body_bytes: larger bodies are refused.
        max_elements: batches of more are refused; see `check_elements`.
    """

    def __init__(self, layers: Layers, max_body_bytes: int, max_elements: int) -> None:
        self._layers = layers
        self._batches = layers.batches
        self._max_body_bytes = max_body_bytes
        self._max_elements = max_elements

    async def train(self, name: str, query: bytes, headers: Headers, receive: Receive) -> Response:
        """Normalize a batch with its own statistics and fold them into the layer's."""
        asked = parse_query(TrainQuery, query)
        exchange = _Exchange(headers, self._max_elements, statistics=asked.statistics == "true")
        key = idempotency_key(headers)
        exchange.body = await read_body(headers, receive, self._max_body_bytes)
        group = asked.group_call
        call = self._batches.train(
            name, exchange.read, key, nbytes=exchange.bytes_read, statistics=exchange.statistics, group=group
        )
        return await self._answer(exchange, await (unless_gone(receive, call) if group else call))

    def train_soon(self, name: str, headers: Headers, body: memoryview) -> tuple[Training, Encode] | None:
        """What `train` begins with a body that is here, if it has to wait for its commit alone; otherwise None."""
        try:
            exchange = _Exchange(headers, self._max_elements, statistics=False)
            key = idempotency_key(headers)
        except ProblemError:
            return None
        exchange.body = body
        if not self._batches.at_once(exchange.cost):
            return None
        training = self._batches.train_soon(name, exchange.read, key)
        return None if training is None else (training, exchange.answer)

    async def eval(self, name: str, query: bytes, headers: Headers, receive: Receive) -> Response:
        """Normalize a batch with the layer's running statistics."""
        asked = parse_query(NormalizeQuery, query)
        exchange = _Exchange(headers, self._max_elements, statistics=asked.statistics == "true")
        exchange.body = await read_body(headers, receive, self._max_body_bytes)
        done = await self._batches.eval(name, exchange.read, nbytes=exchange.bytes_read, statistics=exchange.statistics)
        return await self._answer(exchange, done)

    def eval_now(self, name: str, headers: Headers, body: memoryview) -> Response | None:
        """What `eval` answers to a body that is here, if that waits for nothing; otherwise None."""
        exchange = _Exchange(headers, self._max_elements, statistics=False)
        exchange.body = body
        if not self._batches.at_once(exchange.cost):
            return None
        done = self._batches.eval_now(name, exchange.read)
        return None if done is None else exchange.answer(done)

    async def inverse(self, name: str, query: bytes, headers: Headers, receive: Receive) -> Response:
        """Undo what eval does to a batch."""
        parse_query(NoQuery, query)
        exchange = _Exchange(headers, self._max_elements, statistics=False)
        exchange.body = await read_body(headers, receive, self._max_body_bytes)
        return await self._answer(
            exchange, await self._batches.inverse(name, exchange.read, nbytes=exchange.bytes_read)
        )

    async def _answer(self, exchange: _Exchange, done: Normalized) -> Response:
        return await self._layers.run_codec(exchange.text_bytes(done), exchange.answer, done)


class _Exchange:
    """One request and its answer: what the caller sent, in which form, and in which forms it takes the output."""

    __slots__ = ("_forms", "_max_elements", "_media", "body", "statistics")

    def __init__(self, headers: Headers, max_elements: int, *, statistics: bool) -> None:
        self._max_elements = max_elements
        self.statistics = statistics
        self.body: bytearray | memoryview = bytearray()
        self._media = content_type(headers, TENSOR_MEDIA_TYPES)
        self._forms = accepted(headers.get(b"accept"), FORMS_FOR[self._media])

    @property
    def cost(self) -> int:
        """About how many bytes are read, and written as text: a float16 of the body may become 16 bytes of JSON."""
        written_as_text = self._forms[0] == JSON and self._media != JSON
        return len(self.body) * (8 if written_as_text else 1)

    @property
    def bytes_read(self) -> int:
        """How many bytes of the body are read, and not only viewed."""
        return bytes_read(self._media, self.body)

    def text_bytes(self, done: Normalized) -> int:
        """How many bytes of text the answer has, about."""
        form = tensor_form(self._forms, done.output.dtype, self.statistics)
        return text_bytes(form, (done.output, *done.statistics.values()))

    def read(self, dtypes: Mapping[str, str]) -> Mapping[str, Tensor]:
        """The caller's tensors. Refuses a batch whose output no admitted form can carry, while nothing is folded."""
        tensors = decode(self._media, self.body, dtypes)
        if (batch := tensors.get("input")) is not None:
            form = tensor_form(self._forms, batch.dtype, self.statistics)
            check_elements(batch, self._max_elements, json=JSON in (self._media, form), field="input")
        return tensors

    def answer(self, done: Normalized) -> Response:
        """The output in the best form that the caller takes."""
        form = tensor_form(self._forms, done.output.dtype, self.statistics)
        fields: dict[str, Any] = {}
        if form == JSON:
            fields = {"version": done.version, "num_batches_tracked": done.num_batches_tracked}
        headers: list[RawHeader] = [
            (b"etag", etag(done.version)),
            (_VERSION, b"%d" % done.version),
            (_BATCHES, b"%d" % done.num_batches_tracked),
        ]
        if done.replayed:
            headers.append(REPLAYED)
        return Response(200, form, encode(form, {"output": done.output, **done.statistics}, fields), headers)


def add_normalize_routes(app: FastAPI, calls: NormalizeCalls) -> None:
    """The calls as routes of `app`."""
    problems = (
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

    @app.post(
        "/v1/layers/{name}/train",
        **describe(
            "train",
            "Normalize with the batch's statistics, and fold them into the running ones",
            query=TrainQuery,
            headers=(IDEMPOTENCY_KEY,),
            body=tensor_body(TENSOR_MEDIA_TYPES, "InputBatch", "input"),
            answers={200: tensor_response(TENSOR_MEDIA_TYPES, replay=True)},
            problems=(*problems, "idempotency-key-reused", "group-closed", "group-mismatch", "group-incomplete"),
        ),
    )
    async def train(name: LayerNamePath, request: Request) -> Response:
        """Answers after the commit: the batch is in the running statistics exactly once per Idempotency-Key."""
        headers = read_headers(request.scope["headers"])
        return await calls.train(name, request.scope["query_string"], headers, request.receive)

    @app.post(
        "/v1/layers/{name}/eval",
        **describe(
            "eval",
            "Normalize with the running statistics",
            query=NormalizeQuery,
            body=tensor_body(TENSOR_MEDIA_TYPES, "InputBatch", "input"),
            answers={200: tensor_response(TENSOR_MEDIA_TYPES)},
            problems=problems,
        ),
    )
    async def eval_(name: LayerNamePath, request: Request) -> Response:
        """Uses the newest committed state and changes nothing. A batch may be empty."""
        headers = read_headers(request.scope["headers"])
        return await calls.eval(name, request.scope["query_string"], headers, request.receive)

    @app.post(
        "/v1/layers/{name}/inverse",
        **describe(
            "inverse",
            "Undo eval's normalization",
            body=tensor_body(TENSOR_MEDIA_TYPES, "InputBatch", "input"),
            answers={200: tensor_response(TENSOR_MEDIA_TYPES)},
            problems=problems,
        ),
    )
    async def inverse(name: LayerNamePath, request: Request) -> Response:
        """As scikit-learn's inverse_transform. What a layer's `clip` cut off does not come back."""
        headers = read_headers(request.scope["headers"])
        return await calls.inverse(name, request.scope["query_string"], headers, request.receive)
