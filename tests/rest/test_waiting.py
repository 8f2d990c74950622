"""Calls that wait for another state (`wait`)."""

import asyncio

import pytest
from safetensors.numpy import load

from batchnorm_client.wire.tensors import encode_safetensors
from batchnorm_service.layers import layer_states
from fast_path.running import until
from telemetry.tracing import Exported

pytestmark = pytest.mark.anyio

ONE, MANY, PREFIX = "/v1/layers/a/state", "/v1/state?names=a,b", "/v1/state?prefix=a"
URLS = pytest.mark.parametrize("url", [ONE, MANY, PREFIX])


@pytest.fixture
async def layers(client):
    for name in ("a", "b"):
        (await client.put(f"/v1/layers/{name}", json={"num_features": 2})).raise_for_status()


def waiting_for(url, seconds):
    return f"{url}{'&' if '?' in url else '?'}wait={seconds}"


def waits(service):
    return service.gateway.app.state.layers.states.watches.waiting


async def train(client, name="a"):
    (await client.post(f"/v1/layers/{name}/train", json={"input": [[1, 2], [3, 6]]})).raise_for_status()


async def start(service, client, url, tag, seconds=60, count=1):
    """Calls that wait, once they do."""
    before = waits(service)
    calls = [
        asyncio.create_task(client.get(waiting_for(url, seconds), headers={"If-None-Match": tag}, timeout=90))
        for _ in range(count)
    ]
    await until(lambda: waits(service) == before + count)
    return calls


@URLS
async def test_a_commit_ends_the_wait(service, client, layers, url):
    tag = (await client.get(url)).headers["etag"]
    calls = await start(service, client, url, tag, count=3)
    await train(client)
    now = await client.get(url)
    for call in calls:
        answer = await call
        assert (answer.status_code, answer.headers["etag"], answer.content) == (200, now.headers["etag"], now.content)
    assert waits(service) == 0


@URLS
async def test_the_time_is_over(service, client, layers, url):
    tag = (await client.get(url)).headers["etag"]
    answer = await client.get(waiting_for(url, 0.05), headers={"If-None-Match": tag})
    assert (answer.status_code, answer.headers["etag"], answer.content) == (304, tag, b"")


@URLS
async def test_who_knows_another_state_or_none_does_not_wait(client, layers, url):
    old = (await client.get(url)).headers["etag"]
    await train(client)
    for headers in ({"If-None-Match": old}, {}, {"If-None-Match": "no tag"}):
        answer = await client.get(waiting_for(url, 60), headers=headers)
        assert answer.status_code == 200
        assert answer.headers["etag"] != old


async def test_a_version_is_known_too(service, client, layers):
    assert (await client.get(waiting_for(ONE, 60), headers={"If-None-Match": '"7"'})).status_code == 200
    (call,) = await start(service, client, ONE, '"1"')
    await train(client)
    assert load((await call).content)["num_batches_tracked"] == 1


@URLS
async def test_a_layer_that_goes(service, client, layers, url):
    (call,) = await start(service, client, url, (await client.get(url)).headers["etag"])
    (await client.delete("/v1/layers/a")).raise_for_status()
    answer = await call
    if url == PREFIX:
        assert (answer.status_code, load(answer.content)) == (200, {})
    else:
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/layer-not-found")


async def test_a_layer_that_comes(service, client, layers):
    (call,) = await start(service, client, PREFIX, (await client.get(PREFIX)).headers["etag"])
    (await client.put("/v1/layers/a2", json={"num_features": 1})).raise_for_status()
    assert "a2.running_mean" in load((await call).content)


async def test_another_layer_does_not_end_the_wait(service, client, layers):
    (call,) = await start(service, client, PREFIX, (await client.get(PREFIX)).headers["etag"])
    await train(client, "b")
    await client.delete("/v1/layers/b")
    assert not call.done()
    assert waits(service) == 1
    await train(client, "a")
    assert (await call).status_code == 200


async def test_json(service, client, layers):
    headers = {"Accept": "application/json"}
    tag = (await client.get(ONE, headers=headers)).headers["etag"]
    call = asyncio.create_task(client.get(waiting_for(ONE, 60), headers={**headers, "If-None-Match": tag}))
    await until(lambda: waits(service) == 1)
    await train(client)
    assert (await call).json()["running_mean"] == pytest.approx([0.2, 0.4])


async def test_wait_beside_at(client, layers):
    answer = await client.get("/v1/layers/a/state?at=1&wait=1")
    assert (answer.status_code, answer.json()["field"]) == (422, "wait")


@URLS
async def test_calls_that_ask_at_once_are_not_refused_because_of_each_other(serve, url):
    async with serve(max_concurrent_requests=16) as service, service.client() as client:
        for name in ("a", "b"):
            (await client.put(f"/v1/layers/{name}", json={"num_features": 2})).raise_for_status()
        tag = (await client.get(url)).headers["etag"]
        for _ in range(2):
            calls = await start(service, client, url, tag, count=200)
            assert service.gateway.running == 0
            await train(client)
            answers = await asyncio.gather(*calls)
            assert [answer.status_code for answer in answers] == [200] * 200
            tag = answers[0].headers["etag"]


async def test_waiting_calls_do_not_run_and_have_a_limit(serve):
    async with serve(max_concurrent_requests=2, max_waiting_calls=5) as service, service.client() as client:
        await client.put("/v1/layers/a", json={"num_features": 2})
        tag = (await client.get(ONE)).headers["etag"]
        calls = [call for _ in range(5) for call in await start(service, client, ONE, tag)]
        assert service.gateway.running == 0
        refused = await client.get(waiting_for(ONE, 60), headers={"If-None-Match": tag})
        assert (refused.status_code, refused.json()["type"]) == (503, "/problems/overloaded")
        assert refused.headers["retry-after"] == "1"
        assert "batchnorm_waiting_calls 5.0" in (await client.get("/metrics")).text
        await train(client)
        assert {(await call).status_code for call in calls} == {200}
        assert "batchnorm_waiting_calls 0.0" in (await client.get("/metrics")).text
        assert service.gateway.running == 0


async def test_the_time_of_a_wait_is_not_that_of_the_call(service, client, layers):
    tag = (await client.get(ONE)).headers["etag"]
    await client.get(waiting_for(ONE, 0.6), headers={"If-None-Match": tag})
    lines = (await client.get("/metrics")).text.splitlines()
    (took,) = [line for line in lines if line.startswith("batchnorm_request_seconds_sum") and '"3xx"' in line]
    assert float(took.split()[-1]) < 0.5


async def test_the_server_stops(serve):
    async with serve() as service, service.client() as client:
        await client.put("/v1/layers/a", json={"num_features": 2})
        tag = (await client.get(ONE)).headers["etag"]
        (call,) = await start(service, client, ONE, tag)
        service.gateway.stop_waiting()
        answer = await call
        assert (answer.status_code, answer.headers["etag"]) == (304, tag)
        later = await client.get(waiting_for(ONE, 60), headers={"If-None-Match": tag})
        assert later.status_code == 304


@pytest.mark.parametrize("way", ["fast path"], indirect=True)
@pytest.mark.parametrize("headers", [{}, {"Connection": "TE"}], ids=["fast path", "asgi"])
async def test_a_client_that_disconnects_waits_no_longer(serve, headers):
    exported = Exported()
    async with serve(traces=exported.traces) as service, service.client() as client:
        await client.put("/v1/layers/a", json={"num_features": 2})
        tag = (await client.get(ONE)).headers["etag"]
        exported.clear()
        async with service.client(**headers) as leaving:
            (call,) = await start(service, leaving, ONE, tag)
            call.cancel()
        await until(lambda: exported.spans)
        assert waits(service) == service.gateway.running == 0
        (span,) = exported.spans
        assert (span.name, span.attributes["batchnorm.outcome"]) == ("GET /v1/layers/{name}/state", "disconnected")
        lines = (await client.get("/metrics")).text.splitlines()
        counts = [line for line in lines if "request_seconds_count" in line and "disconnected" in line]
        assert [count.split()[-1] for count in counts] == ["1.0"]


async def test_an_answer_is_encoded_once(service, client, layers, monkeypatch):
    written = []

    def counted(*arguments):
        written.append(1)
        return encode_safetensors(*arguments)

    monkeypatch.setattr(layer_states, "encode_safetensors", counted)
    tag = (await client.get(MANY)).headers["etag"]
    written.clear()
    calls = await start(service, client, MANY, tag, count=20)
    await train(client)
    assert len({(await call).content for call in calls}) == 1
    assert written == [1]
