"""Counts inference requests by layer, as Triton's statistics extension does; in this process, since its start."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final

from starlette.requests import Request

from batchnorm_service.layers import Layers
from batchnorm_service.rest.layer_request import LayerRequest
from batchnorm_service.rest.openapi import describe_responses
from batchnorm_service.rest.queries import NoQuery, parse_query
from batchnorm_service.rest.responses import Response, respond_json
from batchnorm_service.rest.routes import READ, LayerName, call_endpoint, document_router
from batchnorm_service.rest.target import MODEL

from .documents import Duration, InferenceStatistics, ModelStatistics, StatisticsResponse

MAX_LAYERS: Final = 10_000
"""Layers whose requests are counted: those that were used last. A layer takes about 300 bytes."""

_NONE: Final = Duration(count=0, ns=0)


class LayerCounts:
    """What happened to one layer.

    Attributes:
        last: the time of the last request that succeeded, in milliseconds since 1970.
        rows: of all batches.
        successes, failures: how many requests.
        failure_ns: how long those that failed took.
        input_ns, infer_ns, output_ns: how long reading, normalizing and writing took.
    """

    __slots__ = ("failure_ns", "failures", "infer_ns", "input_ns", "last", "output_ns", "rows", "successes")

    def __init__(self) -> None:
        self.last = self.rows = self.successes = self.failures = self.failure_ns = 0
        self.input_ns = self.infer_ns = self.output_ns = 0

    def document(self, name: str, version: int) -> ModelStatistics:
        """The counts, as Triton names them."""

        def done(ns: int) -> Duration:
            return Duration(count=self.successes, ns=ns)

        return ModelStatistics(
            name=name,
            version=str(version),
            last_inference=self.last,
            inference_count=self.rows,
            execution_count=self.successes,
            inference_stats=InferenceStatistics(
                success=done(self.input_ns + self.infer_ns + self.output_ns),
                fail=Duration(count=self.failures, ns=self.failure_ns),
                queue=done(0),
                compute_input=done(self.input_ns),
                compute_infer=done(self.infer_ns),
                compute_output=done(self.output_ns),
                cache_hit=_NONE,
                cache_miss=_NONE,
            ),
            response_stats={},
            batch_stats=[],
            memory_usage=[],
        )


class Statistics:
    """Counts of the layers that were used last.

    Args:
        layers: to see which exist.
        most: how many layers.
    """

    def __init__(self, layers: Layers, most: int = MAX_LAYERS) -> None:
        self._layers = layers
        self._most = most
        self._counts: OrderedDict[str, LayerCounts] = OrderedDict()

    def succeed(self, name: str, rows: int, times: tuple[int, int, int, int]) -> None:
        """Count a request.

        Args:
            name: of the layer.
            rows: of the batch.
            times: when the request began, was read, was computed, and was written, in nanoseconds.
        """
        counts = self._of(name)
        began, read, computed, written = times
        counts.last = time.time_ns() // 1_000_000
        counts.rows += rows
        counts.successes += 1
        counts.input_ns += read - began
        counts.infer_ns += computed - read
        counts.output_ns += written - computed

    def fail(self, name: str, ns: int, *, exists: bool) -> None:
        """Count a request that failed; not if it is unknown whether the layer exists: clients choose names."""
        if exists or name in self._counts:
            counts = self._of(name)
            counts.failures += 1
            counts.failure_ns += ns

    def _of(self, name: str) -> LayerCounts:
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = LayerCounts()
            if len(self._counts) > self._most:
                self._counts.popitem(last=False)
        else:
            self._counts.move_to_end(name)
        return counts

    async def read(self, request: LayerRequest) -> Response:
        """The endpoint of `read_statistics`."""
        parse_query(NoQuery, request.query)
        layer = await self._layers.get(request.name)
        counts = self._counts.get(layer.name) or LayerCounts()
        document = StatisticsResponse(model_stats=[counts.document(layer.name, layer.version)])
        return respond_json(200, document.model_dump())


router = document_router("open inference protocol")


@router.get(
    f"{MODEL}/stats",
    dependencies=[READ],
    summary="How many inference requests a layer had",
    response_model=StatisticsResponse,
    responses=describe_responses("The counts", problems=("layer-not-found",)),
)
async def read_statistics(name: LayerName, request: Request) -> Response:
    """Of this process since its start, by /v2 only; `/metrics` counts those of all processes, by route.

    `compute_infer` of a request in train mode includes waiting for its commit.
    """
    return await call_endpoint(name, request)
