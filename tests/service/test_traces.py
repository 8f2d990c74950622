"""Traces and logs of a service with several workers: each exports its own spans, and a log line leads to its trace."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from telemetry.tracing import CALLER

BATCH = {"input": [[1, 2], [3, 5]]}
STAGES = {"decode", "normalize", "wait for the commit", "commit", "encode"}


@contextlib.contextmanager
def collector():
    """A collector of traces: its address, and what it received as (attributes of the resource, span)."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            message = ExportTraceServiceRequest()
            message.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            for each in message.resource_spans:
                resource = {pair.key: pair.value for pair in each.resource.attributes}
                received.extend((resource, span) for scope in each.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.timeout(300)
def test_several_workers(start, store):
    with collector() as (address, received):
        service = start(
            *("--store", store, "--workers", "2"),
            BATCHNORM_TRACES="1",
            BATCHNORM_ACCESS_LOG="1",
            OTEL_EXPORTER_OTLP_ENDPOINT=address,
            OTEL_SERVICE_NAME="ours",
        )
        printed = len(service.output)
        layer = f"{service.url}/v1/layers/a"
        httpx.put(layer, json={"num_features": 2}).raise_for_status()
        for number in range(1, 31):  # by connections of their own, which any worker accepts
            headers = {"traceparent": f"00-{number:032x}-{CALLER}-01"}
            httpx.post(f"{layer}/train", json=BATCH, headers=headers).raise_for_status()
        unsampled = {"traceparent": f"00-{99:032x}-{CALLER}-00"}
        httpx.post(f"{layer}/train", json=BATCH, headers=unsampled).raise_for_status()
        assert service.stop() == 0  # what is left is exported
    traces = {}
    for resource, span in received:
        assert resource["service.name"].string_value == "ours"
        traces.setdefault(int.from_bytes(span.trace_id), []).append((resource["process.pid"].int_value, span))
    for number in range(1, 31):
        assert len({pid for pid, _ in traces[number]}) == 1
        spans = {span.name: span for _, span in traces[number]}
        request = spans.pop("POST /v1/layers/{name}/train")
        assert request.parent_span_id.hex() == CALLER
        assert spans.keys() == STAGES
        wait = spans["wait for the commit"]
        assert {span.parent_span_id for span in spans.values()} == {request.span_id, wait.span_id}
        assert spans["commit"].parent_span_id == wait.span_id
    assert 99 not in traces
    lines = [json.loads(line) for line in service.output[printed:].splitlines()]
    by_trace = {int(line["trace_id"], 16): line for line in lines if line.get("trace_id")}
    assert {number for number in by_trace if number < 99} == set(range(1, 31))
    for number in range(1, 31):
        names = {span.span_id.hex(): span.name for _, span in traces[number]}
        assert names[by_trace[number]["span_id"]] == "POST /v1/layers/{name}/train"
    assert "span_id" not in by_trace[99]


def test_a_collector_that_is_not_there(start):
    """Calls do not wait for it, nor does a stop for long."""
    service = start("--store", "memory:", BATCHNORM_TRACES="1", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    layer = f"{service.url}/v1/layers/a"
    httpx.put(layer, json={"num_features": 2}).raise_for_status()
    httpx.post(f"{layer}/train", json=BATCH).raise_for_status()
    assert service.stop() == 0  # within the 30 seconds that `Process.wait` allows
    assert "Traceback" not in service.output
