"""A call of the client and the service's work for it are one trace, by both ways in."""

import asyncio
import subprocess
import sys

import httpx
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from batchnorm_client import AsyncClient, Client, ConnectionFailed, LayerNotFound, Retry

from .tracing import Exported, parents

pytestmark = pytest.mark.anyio

TRAIN = "POST /v1/layers/{name}/train"
BATCH = np.array([[1, 2], [3, 5]], np.float32)


@pytest.fixture
def configured(monkeypatch):
    """`configured()` sets up OpenTelemetry as an application does; returns where its spans are."""

    def configure(**options):
        memory = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False, **options)
        provider.add_span_processor(SimpleSpanProcessor(memory))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        return memory

    return configure


def connection(service):
    """How a client reaches the service."""
    if service._port:
        return {"base_url": f"http://127.0.0.1:{service._port}/"}
    return {"http": service.client()}


async def test_one_trace_across_client_and_service(serve, configured):
    memory, exported = configured(), Exported()
    async with serve(traces=exported.traces) as service, AsyncClient(**connection(service)) as client:
        layer = await client.create_layer("a", num_features=2)
        memory.clear()
        exported.take()
        with trace.get_tracer("application").start_as_current_span("step"):
            await layer.train(BATCH)
    ours, step = memory.get_finished_spans()
    assert (ours.name, ours.kind, ours.parent.span_id) == (TRAIN, SpanKind.CLIENT, step.context.span_id)
    spans = exported.take()
    assert parents(spans) == {
        TRAIN: f"{ours.context.span_id:016x}",
        "decode": TRAIN,
        "normalize": TRAIN,
        "wait for the commit": TRAIN,
        "commit": "wait for the commit",
        "encode": TRAIN,
    }
    assert {span.context.trace_id for span in [ours, step, *spans.values()]} == {step.context.trace_id}
    host, port = ("127.0.0.1", service._port) if service._port else ("test", 80)
    shown = f"http://{host}:{port}" if service._port else "http://test"
    assert dict(ours.attributes) == {
        "http.request.method": "POST",
        "server.address": host,
        "server.port": port,
        "url.full": f"{shown}/v1/layers/a/train",
        "http.response.status_code": 200,
    }


@pytest.mark.parametrize("way", ["fast path"], indirect=True)
async def test_the_synchronous_client(serve, configured):
    memory, exported = configured(), Exported()

    def call(url):
        with Client(url) as client:
            client.create_layer("a", num_features=2).train(BATCH)

    async with serve(traces=exported.traces) as service:
        await asyncio.to_thread(call, f"http://user:secret@127.0.0.1:{service._port}")
    created, trained = memory.get_finished_spans()
    assert (created.name, trained.name) == ("PUT /v1/layers/{name}", TRAIN)
    assert "secret" not in created.to_json() + trained.to_json()
    (request,) = [span for span in exported.spans if span.name == TRAIN]
    assert (request.parent.span_id, request.context.trace_id) == (trained.context.span_id, trained.context.trace_id)


async def test_a_trace_that_the_application_does_not_sample(serve, configured):
    memory, exported = configured(sampler=ALWAYS_OFF), Exported()
    async with serve(traces=exported.traces) as service, AsyncClient(**connection(service)) as client:
        await client.create_layer("a", num_features=2)
    assert not memory.get_finished_spans()
    assert not exported.spans


async def test_an_application_without_a_provider(serve):
    """The API is imported here, but nothing is set up."""
    exported = Exported()
    async with serve(traces=exported.traces) as service, AsyncClient(**connection(service)) as client:
        await client.create_layer("a", num_features=2)
    assert [span.parent for span in exported.spans if span.kind is SpanKind.SERVER] == [None]


async def test_each_attempt_has_a_span(configured):
    memory, seen = configured(), []

    def answer(request):
        seen.append(request.headers["traceparent"])
        if len(seen) == 1:
            raise httpx.ConnectError("secret")
        if len(seen) == 2:
            return httpx.Response(503)
        return httpx.Response(404, json={"type": "/problems/layer-not-found", "status": 404})

    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    retry = Retry(attempts=3, wait_initial=0, deadline=None)
    async with AsyncClient("http://h", http=http, retry=retry) as client:
        with pytest.raises(LayerNotFound):
            await client.layer("a", at="tag").inspect()
    spans = memory.get_finished_spans()
    assert [header.split("-")[2] for header in seen] == [f"{span.context.span_id:016x}" for span in spans]
    assert [span.attributes.get("http.request.resend_count") for span in spans] == [None, 1, 2]
    assert [span.attributes["error.type"] for span in spans] == [ConnectionFailed.__name__, "503", "404"]
    assert {span.status.status_code for span in spans} == {StatusCode.ERROR}
    assert not any("secret" in span.to_json() for span in spans)


async def test_a_call_that_the_deadline_ends(configured):
    memory = configured()

    async def never(_request):
        await asyncio.sleep(600)

    http = httpx.AsyncClient(transport=httpx.MockTransport(never))
    async with AsyncClient("http://h", http=http, retry=Retry(attempts=1, deadline=0.01)) as client:
        assert not await client.ready()
    (span,) = memory.get_finished_spans()
    assert (span.name, span.attributes["error.type"]) == ("GET /readyz", "TimedOut")


@pytest.mark.parametrize("way", ["asgi"], indirect=True)
def test_the_client_imports_nothing_of_it(way):
    program = """
import sys, httpx
from batchnorm_client import Client
http = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, json={})))
Client("http://h", http=http).ready()
print([name for name in sys.modules if "opentelemetry" in name])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
