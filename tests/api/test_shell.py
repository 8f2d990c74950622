"""What holds for every request, seen as raw ASGI."""

import asyncio
import logging

import pytest

pytestmark = pytest.mark.anyio


def scope(method="POST", path="/v1/layers/bn/train", headers=()):
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers],
    }


class Sent(list):
    async def __call__(self, message):
        self.append(message)

    @property
    def headers(self):
        return dict(self[0]["headers"])


def body(content):
    async def receive():
        return {"type": "http.request", "body": content}

    return receive


async def gone():
    return {"type": "http.disconnect"}


@pytest.fixture
async def bn(client):
    (await client.put("/v1/layers/bn", json={"num_features": 1})).raise_for_status()


@pytest.mark.parametrize("call", [("POST", "/v1/layers/bn/train"), ("PUT", "/v1/layers/other")])
async def test_a_client_that_goes_away_is_no_error(service, bn, caplog, call):
    with caplog.at_level(logging.INFO):
        await service.shell(scope(*call, headers=[(b"content-length", b"10")]), gone, Sent())
    assert caplog.records == []


async def test_too_many_calls_at_once(serve):
    async with serve(max_concurrent_requests=1) as service, service.client() as client:
        blocked = asyncio.Event()

        async def receive():
            await blocked.wait()
            return {"type": "http.disconnect"}

        waiting = asyncio.create_task(service.shell(scope(), receive, Sent()))
        await asyncio.sleep(0)
        for path in ("/v1/layers", "/v1/layers/bn"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["type"]) == (503, "/problems/overloaded")
            assert answer.headers["retry-after"] == "1"
        assert (await client.get("/healthz")).status_code == 200
        blocked.set()
        await waiting
        assert (await client.get("/v1/layers")).status_code == 200


async def test_a_call_that_the_server_gives_up_gets_an_answer(service, bn):
    sent = Sent()
    task = asyncio.create_task(service.shell(scope(), asyncio.Event().wait, sent))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sent[0]["status"] == 503
    assert b"x-request-id" in sent.headers


@pytest.mark.parametrize("call", [("POST", "/v1/layers/none/train"), ("PATCH", "/v1/layers/none"), ("POST", "/no")])
async def test_a_refused_expect_100_closes_the_connection(service, call):
    """The client may never send its body; the connection would wait for it."""
    sent = Sent()
    await service.shell(scope(*call, headers=[(b"expect", b"100-continue")]), body(b"{}"), sent)
    assert sent[0]["status"] == 404 or sent[0]["status"] == 422
    assert sent.headers[b"connection"] == b"close"


async def test_a_log_line_per_request_at_debug(service, client, caplog):
    with caplog.at_level(logging.DEBUG, logger="batchnorm_service.api.shell"):
        await client.get("/healthz", headers={"X-Request-ID": "id"})
    (record,) = caplog.records
    assert record.getMessage().startswith("GET /healthz 200 ")
    assert record.getMessage().endswith(" id")


async def test_a_path_without_its_raw_form(service, bn):
    sent = Sent()
    without = scope(method="GET", path="/v1/layers/bn")
    del without["raw_path"]
    await service.shell(without, body(b""), sent)
    assert sent[0]["status"] == 200


async def test_below_another_application(service, bn):
    sent = Sent()
    mounted = scope(method="GET", path="/mounted/v1/layers/bn") | {"root_path": "/mounted"}
    await service.shell(mounted, body(b""), sent)
    assert sent[0]["status"] == 200
