"""What holds for every request, seen as raw ASGI."""

import asyncio
import logging

import pytest

from fast_path.running import until

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
def way():
    """These tests are the server that calls the application by ASGI."""
    return "asgi"


@pytest.fixture
async def bn(client):
    (await client.put("/v1/layers/bn", json={"num_features": 1})).raise_for_status()


@pytest.mark.parametrize("call", [("POST", "/v1/layers/bn/train"), ("PUT", "/v1/layers/other")])
async def test_a_client_that_goes_away_is_no_error(service, bn, caplog, call):
    with caplog.at_level(logging.INFO):
        await service.gateway(scope(*call, headers=[(b"content-length", b"10")]), gone, Sent())
    assert caplog.records == []


async def test_too_many_calls_at_once(serve):
    async with serve(max_concurrent_requests=1) as service, service.client() as client:
        (await client.put("/v1/layers/bn", json={"num_features": 1})).raise_for_status()
        left = asyncio.Event()
        messages = iter([{"type": "http.request", "body": b'{"input": [[1]]}', "more_body": False}])

        async def receive():
            if message := next(messages, None):
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        shard = scope() | {"query_string": b"group=g&size=2"}  # which waits for the other one
        waiting = asyncio.create_task(service.gateway(shard, receive, Sent()))
        await until(lambda: service.gateway.running)
        for path in ("/v1/layers", "/v1/layers/bn"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["type"]) == (503, "/problems/overloaded")
            assert answer.headers["retry-after"] == "1"
        assert (await client.get("/healthz")).status_code == 200
        left.set()
        await waiting
        assert (await client.get("/v1/layers")).status_code == 200


async def test_bodies_on_their_way_take_no_slot(serve):
    """512 callers who never finished their bodies gave everybody 503."""
    async with serve(max_concurrent_requests=1) as service, service.client() as client:
        (await client.put("/v1/layers/bn", json={"num_features": 1})).raise_for_status()
        forever = asyncio.Event()
        waiting = [asyncio.create_task(service.gateway(scope(), forever.wait, Sent())) for _ in range(3)]
        await asyncio.sleep(0)
        answer = await client.post("/v1/layers/bn/train", json={"input": [[1], [2]]})
        assert answer.status_code == 200
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_a_response_on_its_way_takes_no_slot_and_counts_as_buffered(serve):
    async with serve(max_concurrent_requests=1) as service, service.client() as client:
        (await client.put("/v1/layers/bn", json={"num_features": 1})).raise_for_status()
        batch = b'{"input": [%s]}' % b",".join([b"[1.5]"] * 50_000)
        read, unread = asyncio.Event(), []

        async def send(message):
            unread.append(message)
            await read.wait()

        url = "/v1/layers/bn/eval"
        waiting = asyncio.create_task(service.gateway(scope(path=url), body(batch), send))
        await until(lambda: unread)
        size = int(dict(unread[0]["headers"])[b"content-length"])
        assert service.gateway.transfers.buffered == size
        assert (await client.post(url, json={"input": [[1]]})).status_code == 200
        read.set()
        await waiting
        assert sum(len(message.get("body", b"")) for message in unread) == size
        assert service.gateway.transfers.buffered == 0


async def test_a_call_that_the_server_gives_up_gets_an_answer(service, bn):
    sent = Sent()
    reads = asyncio.Event()

    async def receive():
        reads.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(service.gateway(scope(), receive, sent))
    await reads.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sent[0]["status"] == 503
    assert b"x-request-id" in sent.headers


@pytest.mark.parametrize("call", [("POST", "/v1/layers/none/train"), ("PATCH", "/v1/layers/none"), ("POST", "/no")])
async def test_a_refused_expect_100_closes_the_connection(service, call):
    """The client may never send its body; the connection would wait for it."""
    sent = Sent()
    await service.gateway(scope(*call, headers=[(b"expect", b"100-continue")]), body(b"{}"), sent)
    assert sent[0]["status"] == 404 or sent[0]["status"] == 422
    assert sent.headers[b"connection"] == b"close"


async def test_a_path_without_its_raw_form(service, bn):
    sent = Sent()
    without = scope(method="GET", path="/v1/layers/bn")
    del without["raw_path"]
    await service.gateway(without, body(b""), sent)
    assert sent[0]["status"] == 200


async def test_below_another_application(service, bn):
    sent = Sent()
    mounted = scope(method="GET", path="/mounted/v1/layers/bn") | {"root_path": "/mounted"}
    await service.gateway(mounted, body(b""), sent)
    assert sent[0]["status"] == 200
