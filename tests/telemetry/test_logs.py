"""The log: a line for each request that is to be logged, as JSON or as text, without secrets."""

import contextlib
import io
import json
import logging
import re
import warnings

import pytest

from batchnorm_service.rest.application import all_routers
from batchnorm_service.telemetry.budget import Budget
from batchnorm_service.telemetry.logs import LINES_PER_SECOND, RequestLog, configure_logging
from rest.conftest import by_asgi

from .tracing import TRACE, TRACEPARENT, Exported

pytestmark = pytest.mark.anyio

BATCH = {"input": [[1, 2], [3, 5]]}
URL = "/v1/layers/a"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def logging_to(monkeypatch, stream, level="info"):
    """Log there as the service does, and as pytest does afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers.clear()  # or they would be closed
    for client in ("httpx", "httpcore", "asyncio"):
        monkeypatch.setattr(logging.getLogger(client), "level", logging.WARNING)
    try:
        configure_logging(level, stream)
        yield stream
    finally:
        logging.captureWarnings(capture=False)
        root.handlers[:], root.level = before


@pytest.fixture
def log(monkeypatch):
    with logging_to(monkeypatch, io.StringIO()) as stream:
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


async def test_the_access_log(serve, log):
    exported = Exported()
    async with serve(access_log=True, traces=exported.traces) as service, service.client() as client:
        await client.put(URL, json={"num_features": 2})
        headers = {"X-Request-ID": "mine", "traceparent": TRACEPARENT}
        trained = await client.post(f"{URL}/train", json=BATCH, headers=headers)
        by_asgi = await client.post(f"{URL}/eval?statistics=false", json=BATCH)
        missing = await client.post("/v1/layers/b/eval", json=BATCH)
        await client.get("/healthz", headers={"traceparent": TRACEPARENT})
        await client.get("/v1/layers/a%0Afake/state?token=secret")
    lines = log()
    (traced,) = [span for span in exported.spans if span.attributes.get("batchnorm.request_id") == "mine"]
    line = lines[1]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("timestamp"))
    assert 0 < line.pop("seconds") < trained.elapsed.total_seconds()
    assert line == {
        "level": "info",
        "logger": "batchnorm_service.requests",
        "event": "request",
        "request_id": "mine",
        "trace_id": TRACE,
        "span_id": f"{traced.context.span_id:016x}",
        "method": "POST",
        "route": "/v1/layers/{name}/train",
        "layer": "a",
        "status": 200,
        "outcome": "2xx",
        "bytes_received": len(trained.request.content),
        "bytes_sent": len(trained.content),
    }
    rest = [(line["request_id"], line["layer"], line["outcome"], line["bytes_sent"]) for line in lines[2:4]]
    assert rest == [
        (by_asgi.headers["x-request-id"], "a", "2xx", len(by_asgi.content)),
        (missing.headers["x-request-id"], "b", "layer-not-found", len(missing.content)),
    ]
    assert (lines[4]["route"], lines[4]["trace_id"]) == ("/healthz", TRACE)
    assert lines[4].keys().isdisjoint({"span_id", "layer"})  # of a trace, but without a span of its own
    assert (lines[5]["route"], lines[5]["outcome"]) == ("/v1/layers/{name}/state", "invalid-request")
    assert "layer" not in lines[5]  # what is no valid name is not repeated
    assert len(lines) == 6


async def test_requests_are_not_logged_by_default(serve, log):
    async with serve(slow_call_seconds=1000) as service, service.client() as client:
        await client.put(URL, json={"num_features": 2})
        await client.post(f"{URL}/train", json=BATCH)
        await client.get("/nowhere")
    assert log() == []


async def test_slow_requests_are_logged(serve, log):
    async with serve(slow_call_seconds=1e-9) as service, service.client() as client:
        await client.put(URL, json={"num_features": 2})
        await client.post(f"{URL}/train", json=BATCH)
    assert [(line["event"], line["level"], line["route"]) for line in log()] == [
        ("slow request", "warning", "/v1/layers/{name}"),
        ("slow request", "warning", "/v1/layers/{name}/train"),
    ]


@pytest.mark.parametrize(("error", "status", "level"), [(RuntimeError, 500, "error"), (None, 503, "warning")])
async def test_failed_requests_are_logged(serve, log, monkeypatch, error, status, level):
    async with serve(max_concurrent_requests=1) as service, service.client() as client:
        await client.put(URL, json={"num_features": 2})

        async def broken(*_):
            raise error("a planted bug")

        if error:
            monkeypatch.setattr(service.store, "commit", broken)
        else:
            service.gateway.shares.enter("other")
        answer = await client.post(f"{URL}/train", json=BATCH)
    assert answer.status_code == status
    line = log()[-1]
    assert (line["event"], line["level"], line["status"]) == ("request", level, status)
    assert (line["layer"], line["request_id"]) == ("a", answer.headers["x-request-id"])
    if error:
        traces = [line for line in log() if "a planted bug" in line.get("exception", "")]
        assert answer.headers["x-request-id"] in traces[-1]["event"]


@by_asgi
async def test_a_delayed_401_is_not_slow(serve, log, monkeypatch):
    async def delayed(*_):
        clock[0] += 100
        return True

    clock = [0.0]
    monkeypatch.setattr("batchnorm_service.rest.gateway.time.perf_counter", lambda: clock[0])
    async with (
        serve(token="right", slow_call_seconds=1) as service,
        service.client(authorization="Bearer no") as client,
    ):
        monkeypatch.setattr(service.gateway.guard.failures, "delay", delayed)
        assert (await client.get(URL)).status_code == 401
    assert log() == []


@pytest.mark.parametrize("way", ["fast path"], indirect=True)
async def test_a_request_that_cannot_be_read(serve, log):
    async with serve(access_log=True, max_url_bytes=512) as service, service.client() as client:
        answer = await client.get("/" + "x" * 600)
    uvicorns, line = log()
    assert uvicorns["logger"] == "uvicorn.error"
    assert (line["outcome"], line["status"], line["route"]) == ("payload-too-large", 413, "other")
    assert line["request_id"] == answer.headers["x-request-id"]


def test_a_flood_of_failures_does_not_fill_the_disk(log, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("batchnorm_service.telemetry.budget.time.monotonic", lambda: clock[0])
    requests = RequestLog(slow_seconds=1.0)
    for seconds, expected in ((1.0, LINES_PER_SECOND), (2.5, 2 * LINES_PER_SECOND)):
        clock[0] = seconds
        for _ in range(10 * LINES_PER_SECOND):
            requests.write(503, 0.0, route="/")
        assert len(log()) == expected
    left_out = [line["left_out"] for line in log() if "left_out" in line]
    assert left_out == [9 * LINES_PER_SECOND]
    everything = RequestLog(access=True)
    for _ in range(2 * LINES_PER_SECOND):
        everything.write(503, 0.0, route="/")
    assert len(log()) == 4 * LINES_PER_SECOND


def test_a_budget(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("batchnorm_service.telemetry.budget.time.monotonic", lambda: clock[0])
    budget = Budget(2)
    clock[0] = 1.0
    assert [budget.take() for _ in range(4)] == [True, True, False, False]
    clock[0] = 1.9
    assert not budget.take()
    clock[0] = 2.0
    assert [budget.take() for _ in range(3)] == [True, True, False]
    assert budget.refused == 4


def test_everything_is_json(log):
    """Also what uvicorn and `warnings` say, with line breaks and control characters."""
    logging.getLogger("uvicorn.error").warning("a %s", 'b\n{"level": "error"}\x1b[2J')
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("careful", stacklevel=1)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("failed")
    first, second, third = log()
    assert first["event"] == 'a b\n{"level": "error"}\x1b[2J'
    assert (first["logger"], first["level"]) == ("uvicorn.error", "warning")
    assert second["logger"] == "py.warnings"
    assert "careful" in second["event"]
    assert third["exception"].splitlines()[-1] == "ValueError: broken"


def test_text_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    with logging_to(monkeypatch, Terminal()) as colored:
        RequestLog(access=True).write(200, 0.25, request_id="mine", layer="a")
    assert "\x1b[" in colored.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    with logging_to(monkeypatch, Terminal()) as plain:
        RequestLog(access=True).write(200, 0.25, request_id="mine", layer="a")
        logging.getLogger("x").warning("one\n2026-11-26 [error] two\x1b[2J\x9b1m")
    assert re.sub(r"\x1b\[\d*m", "", colored.getvalue())[30:] == plain.getvalue().splitlines()[0][30:] + "\n"
    request, other = plain.getvalue().splitlines()
    assert re.search(
        r"\[info +\] request +\[batchnorm_service.requests\] layer=a request_id=mine seconds=0.25", request
    )
    assert r"one\n2026-11-26 [error] two\x1b[2J\x9b1m" in other


SECRET, NUMBER = "s3cret-t0ken", 8472.625
CONTENT = {
    "PUT": {"num_features": 2},
    "POST": {"input": [[NUMBER, 2], [3, NUMBER]], "mean": [NUMBER, 1], "var": [NUMBER, 1], "count": 2},
    "PATCH": {"weight": [NUMBER, 1]},
}


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("broken", [False, True])
async def test_no_line_has_a_token_or_a_tensors_value(serve, monkeypatch, stream, broken):
    """On every route, with everything that can be logged, also when it fails with a bug, and with a wrong token."""
    settings = {"access_log": True, "slow_call_seconds": 1e-9, "log_level": "debug"}
    with logging_to(monkeypatch, stream(), "debug") as log:
        async with serve(token=SECRET, **settings) as service:
            async with service.client(authorization=f"Bearer {SECRET}") as client:
                (await client.put(URL, json={"num_features": 2})).raise_for_status()

                def planted(*_, **__):
                    secret, value = SECRET, NUMBER  # local variables of the traceback
                    raise RuntimeError(f"{len(secret) < value}")

                if broken:
                    monkeypatch.setattr(service.store, "load", planted)
                    monkeypatch.setattr(service.store, "commit", planted)
                    monkeypatch.setattr("batchnorm_service.engine.normalize.eval_step", planted)
                routes = [
                    route for router in all_routers(service.gateway.app.state.interfaces) for route in router.routes
                ]
                asked = [(method, route.path) for route in routes for method in route.methods]
                for method, path in asked:
                    url = re.sub(r"\{\w+\}", "a", path) + f"?access_token={SECRET}&x={NUMBER}"
                    for target in (url, url.partition("?")[0]):
                        content = CONTENT.get(method)
                        await client.request(method, target, json=content, headers={"Cookie": f"t={SECRET}"})
                for bad in ([[NUMBER]], [["x"]], [[NUMBER, float(2**70)] * 2], NUMBER):
                    await client.post(f"{URL}/train", json={"input": bad, str(NUMBER): SECRET})
            async with service.client(authorization=f"Bearer {SECRET}x") as client:
                await client.get(URL)
    text = log.getvalue()
    assert len(text.splitlines()) > 2 * len(asked)
    assert ("RuntimeError: True" in text) == broken
    assert SECRET not in text
    assert str(NUMBER) not in text
    assert len(asked) > 30
