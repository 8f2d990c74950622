"""Every response is counted once, whichever way its request came."""

import asyncio
import threading

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from batchnorm_service.telemetry import Metrics
from fast_path.running import until
from layers.conftest import settle
from rest.conftest import by_asgi

from .reading import by, metrics, read, total

pytestmark = pytest.mark.anyio

BATCH = {"input": [[1, 2], [3, 5]]}
LAYER = "/v1/layers/{name}"


async def counted(client):
    found = by(await metrics(client), "batchnorm_requests_total", "method", "route", "outcome")
    return {key: value for key, value in found.items() if key[1] != "/metrics"}


async def test_counts_are_those_of_the_calls_made(client):
    url = "/v1/layers/a"
    sent = [
        (1, await client.put(url, json={"num_features": 2})),
        *[(2, await client.post(f"{url}/train", json=BATCH)) for _ in range(4)],
        *[(3, await client.post(f"{url}/train?statistics=false", json=BATCH)) for _ in range(2)],  # by ASGI
        *[(4, await client.post(f"{url}/eval", json=BATCH)) for _ in range(3)],
        (5, await client.post(f"{url}/eval", json={"input": [[1, 2, 3]]})),
        (6, await client.post("/v1/layers/b/eval", json=BATCH)),
        (7, await client.post("/v1/layers/.b/eval", json=BATCH)),
        (8, await client.get(url)),
        (9, await client.get(url, headers={"If-None-Match": '"7"'})),
        (10, await client.head(url)),
        (11, await client.post("/v1/moments", json={"layers": {"a": {"count": 2, "mean": [0, 0], "var": [1, 1]}}})),
        (12, await client.put("/v1/layers", json={})),
        (13, await client.get("/nowhere")),
        (14, await client.request("LOCK", "/nowhere")),
        (15, await client.get("/problems/forbidden")),
        (16, await client.get("/", headers={"Accept": "text/html"})),
        (17, await client.get("/docs/swagger-ui.css")),
    ]
    assert await counted(client) == {
        ("PUT", LAYER, "2xx"): 1,
        ("POST", f"{LAYER}/train", "2xx"): 6,
        ("POST", f"{LAYER}/eval", "2xx"): 3,
        ("POST", f"{LAYER}/eval", "shape-mismatch"): 1,
        ("POST", f"{LAYER}/eval", "layer-not-found"): 1,
        ("POST", f"{LAYER}/eval", "invalid-request"): 1,
        ("GET", LAYER, "2xx"): 1,
        ("GET", LAYER, "3xx"): 1,
        ("HEAD", LAYER, "2xx"): 1,
        ("POST", "/v1/moments", "2xx"): 1,
        ("PUT", "/v1/layers", "method-not-allowed"): 1,
        ("GET", "other", "not-found"): 1,
        ("other", "other", "not-found"): 1,
        ("GET", "/problems/{problem}", "2xx"): 1,
        ("GET", "/", "3xx"): 1,
        ("GET", "/docs/swagger-ui.css", "2xx"): 1,
    }
    found = await metrics(client)
    assert total(found, "batchnorm_request_seconds_count") == len(sent) + 1  # the first GET of /metrics
    posted = [answer for number, answer in sent if number in (2, 3)]
    train = {"method": "POST", "route": f"{LAYER}/train", "outcome": "2xx"}
    assert total(found, "batchnorm_request_bytes_total", **train) == sum(len(each.request.content) for each in posted)
    assert total(found, "batchnorm_response_bytes_total", **train) == sum(len(each.content) for each in posted)
    assert (
        0
        < total(found, "batchnorm_request_seconds_sum", **train)
        < sum(each.elapsed.total_seconds() for each in posted)
    )
    assert total(found, "batchnorm_request_seconds_bucket", **train, le="+Inf") == len(posted)


async def test_an_internal_error_is_counted(service, client, layer_with_a_bug):
    assert (await client.post(f"{layer_with_a_bug}/eval", json=BATCH)).status_code == 500
    assert (await client.get(layer_with_a_bug)).status_code == 500
    assert (await client.get(f"{layer_with_a_bug}/state")).status_code == 500
    found = await counted(client)
    assert found["POST", f"{LAYER}/eval", "internal-error"] == 1
    assert found["GET", LAYER, "internal-error"] == 1
    assert found["GET", f"{LAYER}/state", "internal-error"] == 1


@pytest.fixture
async def layer_with_a_bug(service, client, monkeypatch):
    async def broken(*_):
        raise RuntimeError("broken")

    (await client.put("/v1/layers/a", json={"num_features": 2})).raise_for_status()
    monkeypatch.setattr(service.store, "exclusive", False)
    monkeypatch.setattr(service.store, "load", broken)
    return "/v1/layers/a"


async def test_refused_for_want_of_a_token(serve):
    async with serve(token="full") as service, service.client() as client:
        await client.post("/v1/layers/a/train", json=BATCH)
        await client.get("/v1/layers/a/state")
        assert await counted(client) == {
            ("POST", f"{LAYER}/train", "unauthenticated"): 1,
            ("GET", f"{LAYER}/state", "unauthenticated"): 1,
        }


async def test_a_setting_closes_them(serve):
    async with serve(token="full", read_token="read", metrics_token_required=True) as service:
        for headers, status in (({}, 401), ({"authorization": "Bearer read"}, 200)):
            async with service.client(**headers) as client:
                assert (await client.get("/metrics")).status_code == status


async def test_what_is_off_is_not_there(serve):
    async with serve(metrics=False) as service, service.client() as client:
        answer = await client.get("/metrics")
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")
        await client.put("/v1/layers/a", json={"num_features": 2})
        assert (await client.post("/v1/layers/a/train", json=BATCH)).status_code == 200
        assert service.layers._store is service.store


async def test_whatever_clients_choose_makes_no_series(serve):
    async with serve(drift=False) as service, service.client() as client:  # drift is saved later, which is a series
        await client.put("/v1/layers/a", json={"num_features": 2})

        async def calls(n):
            await client.post(f"/v1/layers/layer-{n}/eval", json=BATCH)
            await client.get(f"/v1/layers/{n}/{n}")
            await client.get(f"/v1/{n}")
            await client.get(f"/{n}", headers={"X-Request-ID": f"{n}", "User-Agent": f"{n}"})
            await client.request(("LOCK", "MKCOL", "SUBSCRIBE")[n % 3], "/healthz")
            await client.post("/v1/layers/a/train", json=BATCH, headers={"Idempotency-Key": f"{n}"})
            await client.get(f"/problems/{n}")

        await calls(0)
        await metrics(client)  # counts itself
        before = await metrics(client)
        for n in range(1, 200):
            await calls(n)
        after = await metrics(client)
        assert before.keys() == after.keys()
    assert total(after, "batchnorm_requests_total") == total(before, "batchnorm_requests_total") + 7 * 199 + 1


async def test_text_and_openmetrics(client):
    plain = await client.get("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    openmetrics = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    families = {family.name: family for family in parse_openmetrics(openmetrics.text)}
    assert families["batchnorm_folds"].type == "counter"
    assert {sample.name for family in families.values() for sample in family.samples} == {
        name for name, _ in read(openmetrics.text.replace("# EOF\n", ""))
    }


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=abc", "text/plain; version=1..0"])
async def test_a_version_that_is_none(client, accept):
    answer = await client.get("/metrics", headers={"Accept": accept})
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, accept.split(";")[0])


@by_asgi
async def test_metrics_are_rendered_once_for_many(client, monkeypatch):
    """A request of 30 bytes without a token makes the service work long."""
    render, renderings, may_go_on = Metrics.render, [], threading.Event()

    def late(self, accept):
        renderings.append(accept)
        assert may_go_on.wait(60)
        return render(self, accept)

    monkeypatch.setattr(Metrics, "render", late)
    asked = [asyncio.create_task(client.get("/metrics")) for _ in range(20)]
    await settle()
    may_go_on.set()
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
    assert len(renderings) == 2, "of the first to ask, and of all who came while it ran"


@pytest.mark.parametrize("way", ["fast path"], indirect=True)
async def test_what_is_no_request_is_counted(service, client):
    reader, writer = await asyncio.open_connection("127.0.0.1", service._port)
    writer.write(b"NONSENSE\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()
    assert await counted(client) == {("other", "other", "malformed-body"): 1}


@pytest.mark.parametrize("way", ["fast path"], indirect=True)
@pytest.mark.parametrize("headers", ["", "Expect: 100-continue\r\n"])  # the second comes by ASGI
@pytest.mark.parametrize("path", ["train", "reset"])  # the second is FastAPI's
async def test_a_client_that_leaves_in_the_middle_of_its_body(client, service, headers, path):
    _, writer = await asyncio.open_connection("127.0.0.1", service._port)
    head = f"POST /v1/layers/a/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}{headers}Content-Length: 1000\r\n\r\n{{".encode())
    await writer.drain()
    await asyncio.sleep(0)
    writer.close()
    expected = {("POST", f"{LAYER}/{path}", "disconnected"): 1}
    await until(lambda: counted(client))
    assert await counted(client) == expected


@by_asgi
async def test_running_calls_and_buffered_bytes(service, client):
    service.gateway.transfers.hold(70)
    service.gateway.shares.enter("bn")
    found = await metrics(client)
    assert total(found, "batchnorm_running_calls") == 1
    assert total(found, "batchnorm_buffered_bytes") == 70


@by_asgi
async def test_a_response_is_counted_before_it_is_sent(service):
    """A client that has its response finds it in the metrics."""
    seen = []

    async def send(message):
        if message["type"] == "http.response.start":
            seen.append(await counted_now(service))

    scope = {"type": "http", "method": "GET", "path": "/healthz", "raw_path": b"/healthz", "query_string": b""}
    await service.gateway(scope | {"headers": []}, receive_nothing, send)
    assert seen == [1]


async def counted_now(service):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.gateway), base_url="http://test") as client:
        return total(await metrics(client), "batchnorm_requests_total", route="/healthz")


async def receive_nothing():
    return {"type": "http.request", "body": b""}
