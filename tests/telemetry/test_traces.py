"""A sampled request is a trace with a span for each stage, whichever way it came."""

import ast
import asyncio
import os
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

import batchnorm_service
from batchnorm_service.app import create_app
from batchnorm_service.layers import Layers
from batchnorm_service.settings import Settings
from batchnorm_service.store.base import StoreError
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.telemetry import CURRENT_SPAN
from batchnorm_service.telemetry.otel import traces_from_environment
from batchnorm_service.telemetry.traces import TRACES_PER_SECOND, TracesRefusedError
from fast_path.running import until
from layers.conftest import CONFIG, batch, settle, train
from rest.conftest import by_asgi

from .test_layers import HeldUp
from .tracing import CALLER, TRACE, TRACEPARENT, Exported, parents

pytestmark = pytest.mark.anyio

BATCH = {"input": [[1, 2], [3, 5]]}
URL = "/v1/layers/a"
TRAIN, EVAL = "POST /v1/layers/{name}/train", "POST /v1/layers/{name}/eval"


@pytest.fixture
async def exported(serve):
    """A service with a layer `a`, whose traces are all exported."""
    exported = Exported(ParentBased(ALWAYS_ON))
    async with serve(traces=exported.traces) as exported.service, exported.service.client() as exported.client:
        (await exported.client.put(URL, json={"num_features": 2})).raise_for_status()
        exported.take()
        yield exported


@pytest.mark.parametrize("query", ["", "?statistics=false"])  # the second by ASGI
async def test_the_spans_of_a_train_call(exported, query):
    answer = await exported.client.post(
        f"{URL}/train{query}",
        json=BATCH,
        headers={"traceparent": TRACEPARENT, "tracestate": "vendor=1,other=2", "X-Request-ID": "mine"},
    )
    spans = exported.take()
    assert parents(spans) == {
        TRAIN: CALLER,
        "decode": TRAIN,
        "normalize": TRAIN,
        "wait for the commit": TRAIN,
        "commit": "wait for the commit",
        "encode": TRAIN,
    }
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert {span.context.trace_state.to_header() for span in spans.values()} == {"vendor=1,other=2"}
    assert [(link.context.span_id) for link in spans["commit"].links] == [spans["wait for the commit"].context.span_id]
    request = spans[TRAIN]
    assert (request.kind, request.parent.is_remote, request.status.status_code) == (
        SpanKind.SERVER,
        True,
        StatusCode.UNSET,
    )
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/layers/{name}/train",
        "http.response.status_code": 200,
        "http.request.body.size": len(answer.request.content),
        "http.response.body.size": len(answer.content),
        "batchnorm.layer": "a",
        "batchnorm.outcome": "2xx",
        "batchnorm.request_id": "mine",
    }
    assert spans["commit"].attributes["batchnorm.result"] == "committed"
    for inner, outer in parents(spans).items():
        if outer in spans:
            assert spans[outer].start_time <= spans[inner].start_time <= spans[inner].end_time
            assert spans[inner].end_time <= spans[outer].end_time
    in_order = [spans[name].start_time for name in ("decode", "normalize", "wait for the commit", "commit", "encode")]
    assert in_order == sorted(in_order)


async def test_the_spans_of_an_eval(exported):
    await exported.client.post(f"{URL}/eval", json=BATCH)
    spans = exported.take()
    assert parents(spans) == {EVAL: None, "decode": EVAL, "normalize": EVAL, "encode": EVAL}
    assert len({span.context.trace_id for span in spans.values()}) == 1


async def test_the_spans_of_an_inference(exported):
    """Of the Open Inference Protocol, whose JSON is read before the layer is known."""
    tensor = {"name": "input", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 5]}
    headers = {"traceparent": TRACEPARENT}
    answer = await exported.client.post("/v2/models/a/infer", json={"inputs": [tensor]}, headers=headers)
    assert answer.status_code == 200
    ((request, caller),) = {
        (span.name, f"{span.parent.span_id:016x}") for span in exported.spans if span.parent.is_remote
    }
    assert (request, caller) == ("POST /v2/models/{name}/infer", CALLER)
    assert {span.name for span in exported.spans} == {request, "decode", "normalize", "encode"}


async def test_the_spans_of_a_change(exported):
    await exported.client.patch(URL, json={"eps": 0.5})
    route = "PATCH /v1/layers/{name}"
    wait = "wait for the commit"
    assert parents(exported.take()) == {route: None, "decode": route, wait: route, "commit": wait, "encode": route}


async def test_the_span_of_a_path_that_is_no_route(exported):
    """Its name is the method alone, and it has no `http.route`: OpenTelemetry's conventions for HTTP spans."""
    assert (await exported.client.get("/nothing")).status_code == 404
    (span,) = exported.take().values()
    assert (span.name, span.attributes["http.response.status_code"]) == ("GET", 404)
    assert "http.route" not in span.attributes


async def test_monitoring_makes_no_traces(exported):
    for path in ("/healthz", "/readyz", "/metrics"):
        assert (await exported.client.get(path)).status_code == 200
    assert not exported.spans


@by_asgi
async def test_a_commit_has_links_to_the_folds_that_it_holds(way):
    store, exported = HeldUp(), Exported()
    await store.open()
    layers = Layers(store, traced=True)
    await layers.create("a", CONFIG)

    async def traced(number):
        CURRENT_SPAN.set(exported.traces.begin({}, f"call {number}"))
        await train(layers, "a", batch(number))

    store.gate.clear()
    calls = [asyncio.create_task(traced(0))]
    await settle()  # its commit is under way
    calls += [asyncio.create_task(traced(number)) for number in (1, 2)]
    calls.append(asyncio.create_task(train(layers, "a", batch(3))))  # not sampled
    await settle()
    store.gate.set()
    await asyncio.gather(*calls)
    await layers.close()
    first, second = [span for span in exported.spans if span.name == "commit"]
    waits = {span.context.span_id: span for span in exported.spans if span.name == "wait for the commit"}
    linked = [[link.context.span_id for link in commit.links] for commit in (first, second)]
    assert [len(each) for each in linked] == [1, 2]
    assert {*linked[0], *linked[1]} == waits.keys()
    assert (first.attributes["batchnorm.updates"], second.attributes["batchnorm.updates"]) == (1, 3)
    for commit, (begun_by, *others) in zip((first, second), linked, strict=True):
        assert (commit.parent.span_id, commit.context.trace_id) == (begun_by, waits[begun_by].context.trace_id)
        for other in others:
            (link,) = waits[other].links
            assert (link.context.trace_id, link.context.span_id) == (
                commit.context.trace_id,
                commit.context.span_id,
            )


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00",
        TRACEPARENT.upper(),
        TRACEPARENT + "-00",
        TRACEPARENT.replace(TRACE, "0" * 32),
        TRACEPARENT.replace(CALLER, "0" * 16),
        "ff" + TRACEPARENT[2:],
        TRACEPARENT[:-3],
        TRACEPARENT.replace("b7", "g7"),
        f"{TRACEPARENT}, {TRACEPARENT}",
    ],
)
async def test_a_malformed_traceparent_is_ignored(exported, traceparent):
    headers = {"traceparent": traceparent, "tracestate": "vendor=1"}
    assert (await exported.client.post(f"{URL}/eval", json=BATCH, headers=headers)).status_code == 200
    request = exported.take()[EVAL]
    assert request.parent is None
    assert f"{request.context.trace_id:032x}" != TRACE
    assert not request.context.trace_state


async def test_a_traceparent_of_a_later_version(exported):
    """It may have more fields (W3C, 4.3)."""
    headers = {"traceparent": f"01-{TRACE}-{CALLER}-01-more"}
    await exported.client.post(f"{URL}/eval", json=BATCH, headers=headers)
    assert parents(exported.take())[EVAL] == CALLER


async def test_a_trace_that_its_caller_does_not_sample(exported):
    for call in ("train", "eval"):
        headers = {"traceparent": TRACEPARENT[:-1] + "0"}
        assert (await exported.client.post(f"{URL}/{call}", json=BATCH, headers=headers)).status_code == 200
    assert not exported.spans


@pytest.mark.parametrize(
    ("sampler", "parent_decides", "flags", "expected"),
    [
        (ParentBased(ALWAYS_OFF), True, None, 0),
        (ParentBased(ALWAYS_OFF), True, "01", 1),  # sampled because the caller does
        (ALWAYS_ON, False, "00", 1),
    ],
)
async def test_the_sampler_decides(serve, sampler, parent_decides, flags, expected):
    exported = Exported(sampler, parent_decides=parent_decides)
    headers = {} if flags is None else {"traceparent": TRACEPARENT[:-2] + flags}
    async with serve(traces=exported.traces) as service, service.client() as client:
        await client.get("/v1/layers/none", headers=headers)
    assert len([span for span in exported.spans if span.kind is SpanKind.SERVER]) == expected


async def test_without_a_sampler_some_traces_begin_in_each_second(serve, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("batchnorm_service.telemetry.budget.time.monotonic", lambda: clock[0])
    exported = Exported(ALWAYS_OFF, per_second=3)  # the sampler is not asked
    async with serve(traces=exported.traces) as service, service.client() as client:
        for seconds, begun in ((0, 3), (0.9, 3), (1.0, 6)):
            clock[0] = 100 + seconds
            for _ in range(5):
                await client.get("/v1/layers/none")
            assert len({span.context.trace_id for span in exported.spans}) == begun
        await client.get("/v1/layers/none", headers={"traceparent": TRACEPARENT})  # another began it
        assert f"{exported.spans[-1].context.trace_id:032x}" == TRACE


async def test_failures(serve, monkeypatch):
    exported = Exported()
    async with (
        serve(traces=exported.traces, store_timeout_seconds=0.001) as service,
        service.client() as client,
    ):
        await client.put(URL, json={"num_features": 2})
        exported.take()
        await client.post(f"{URL}/train", json={"input": [[1, 2, 3]]})
        spans = exported.take()
        assert spans[TRAIN].status.status_code is StatusCode.UNSET  # the caller's fault
        assert spans[TRAIN].attributes["batchnorm.outcome"] == "shape-mismatch"

        async def fails(*_):
            raise StoreError("secret")

        monkeypatch.setattr(service.store, "commit", fails)
        assert (await client.post(f"{URL}/train", json=BATCH)).status_code == 503
        spans = exported.take()
        for name in (TRAIN, "wait for the commit", "commit"):
            assert spans[name].status.status_code is StatusCode.ERROR
            assert spans[name].attributes["error.type"] == "store-unavailable"
            assert "secret" not in spans[name].to_json()


@pytest.mark.parametrize("way", ["fast path"], indirect=True)
async def test_who_leaves_before_the_body_is_complete(serve):
    exported = Exported()
    async with serve(traces=exported.traces) as service:
        _, writer = await asyncio.open_connection("127.0.0.1", service._port)
        writer.write(b"POST /v1/layers/a/train HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        await writer.drain()
        writer.close()
        await until(lambda: exported.spans)
    (span,) = exported.spans
    assert (span.name, span.attributes["batchnorm.outcome"]) == (TRAIN, "disconnected")


def on(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return traces_from_environment()


@by_asgi
def test_the_standard_variables_configure_it(monkeypatch, way):
    assert on(monkeypatch, OTEL_TRACES_EXPORTER="none") is None
    assert on(monkeypatch, OTEL_TRACES_EXPORTER="console", OTEL_SDK_DISABLED="true") is None
    variables = {"OTEL_SDK_DISABLED": "", "OTEL_SERVICE_NAME": "mine", "OTEL_RESOURCE_ATTRIBUTES": "service.version=7"}
    traces = on(monkeypatch, **variables)
    began = [traces.begin({}, "GET") is not None for _ in range(2 * TRACES_PER_SECOND)]
    assert began.index(False) == TRACES_PER_SECOND
    resource = traces._exporter._resource.attributes
    assert (resource["service.name"], resource["service.version"]) == ("mine", "7")
    assert resource["process.pid"] == os.getpid()
    traces.close()
    sampled_by_caller, not_sampled = ({b"traceparent": TRACEPARENT[:-1].encode() + flag} for flag in (b"1", b"0"))
    for sampler, argument, expected in (
        ("always_on", "", [True, True, True]),
        ("parentbased_always_on", "", [True, True, False]),
        ("parentbased_traceidratio", "0.0", [False, True, False]),
        ("always_off", "", [False, False, False]),
    ):
        traces = on(monkeypatch, OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG=argument)
        assert [traces.begin(each, "GET") is not None for each in ({}, sampled_by_caller, not_sampled)] == expected
        traces.close()


@by_asgi
def test_an_exporter_that_is_not_there(monkeypatch, way):
    with pytest.raises(TracesRefusedError, match=r"no exporter 'zipkin' is installed; there are .*otlp_proto_http"):
        on(monkeypatch, OTEL_TRACES_EXPORTER="zipkin")


@by_asgi
def test_without_the_extra(monkeypatch, way):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.delitem(sys.modules, "batchnorm_service.telemetry.otel")
    with pytest.raises(TracesRefusedError, match=r"BATCHNORM_TRACES needs OpenTelemetry: pip install .*otel"):
        create_app(Settings(traces=True), MemoryStore())


@by_asgi
def test_nothing_is_imported_when_they_are_off(way):
    """OpenTelemetry takes a quarter of a second to import, and is an extra."""
    package = Path(batchnorm_service.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "otel.py":
            for node in ast.parse(path.read_text()).body:
                for name in ast.walk(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                    modules = [alias.name for alias in getattr(name, "names", ())] + [getattr(name, "module", None)]
                    assert not [each for each in modules if each and ("opentelemetry" in each or "otel" in each)], path
