"""The fast path: the same responses as by ASGI, in the order of the requests, and with back-pressure."""

import asyncio
import contextlib
import json
import socket

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from batchnorm_client import AsyncClient
from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS
from batchnorm_service.fast_path import eager
from batchnorm_service.layers import moments_source
from batchnorm_service.store.base import Missing
from batchnorm_service.store.memory import MemoryStore

from .running import answer, get, post, serving, until

pytestmark = pytest.mark.anyio

BATCH = np.arange(12, dtype=np.float32).reshape(6, 2) ** 2
TENSORS = save({"input": BATCH})
HUGE = save({"input": np.empty((1 << 40, 2, 0), np.float32)})  # some 90 bytes
ORDINARY = "Connection: TE\r\n"  # says something of the connection that the fast path does not handle


@pytest.fixture
def anyio_backend():
    """On the loop that the service runs on."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
async def service(anyio_backend, monkeypatch):
    async with serving(monkeypatch) as running:
        yield running


def as_json(values):
    return json.dumps({"input": values}).encode()


EVALS = {
    "json": (as_json([[1, 2], [3, 4]]), JSON, ""),
    "safetensors": (TENSORS, SAFETENSORS, ""),
    "npy": (b"\x93NUMPY" + b"?", NPY, ""),
    "another form": (TENSORS, SAFETENSORS, f"Accept: {JSON};q=0.5, {NPY}\r\n"),
    "no form": (TENSORS, SAFETENSORS, "Accept: text/html\r\n"),
    "a charset": (as_json([[1, 2]]), f"{JSON}; charset=latin-1", ""),
    "an encoding": (as_json([[1, 2]]), JSON, "Content-Encoding: gzip\r\n"),
    "no rows": (as_json([]), JSON, ""),
    "no body": (b"", JSON, ""),
    "no JSON": (b"{", JSON, ""),
    "another tensor": (save({"x": BATCH}), SAFETENSORS, ""),
    "channels": (as_json([[1, 2, 3]]), JSON, ""),
    "a dtype": (save({"input": BATCH.astype(np.float64)}), SAFETENSORS, ""),
    "text": (b"1,2", "text/plain", ""),
    "in a thread": (save({"input": np.ones((1 << 18, 2), np.float32)}), SAFETENSORS, ""),
    "a size that no byte pays for": (HUGE, SAFETENSORS, f"Accept: {JSON}\r\n"),
    "a request id": (TENSORS, SAFETENSORS, "X-Request-ID: mine\r\n"),
}


def comparable(got):
    """An answer without what is another at each request."""
    status, headers, body = got
    if "x-request-id" in headers and headers["x-request-id"] != "mine":
        headers = headers | {"x-request-id": len(headers["x-request-id"])}
    return status, sorted((name, value) for name, value in headers.items() if name != "date"), body


@pytest.mark.parametrize("case", EVALS)
@pytest.mark.parametrize("call", ["eval", "inverse"])
async def test_the_answers_are_those_of_asgi(service, case, call):
    body, media, headers = EVALS[case]
    await service.ask(post("/v1/layers/bn/train", TENSORS, SAFETENSORS))
    assert service.by_asgi == 0
    (direct,) = await service.ask(post(f"/v1/layers/bn/{call}", body, media, headers))
    assert service.by_asgi == 0
    (ordinary,) = await service.ask(post(f"/v1/layers/bn/{call}", body, media, headers + ORDINARY))
    assert service.by_asgi == 1
    assert comparable(direct) == comparable(ordinary)
    assert "date" in direct[1]


@pytest.mark.parametrize("call", ["train", "eval", "inverse"])
async def test_a_size_that_no_byte_pays_for_is_refused(service, call):
    assert len(HUGE) < 100
    for headers in ("", f"Accept: {JSON}\r\n"):
        ((status, _, body),) = await service.ask(post(f"/v1/layers/bn/{call}", HUGE, SAFETENSORS, headers))
        assert (status, json.loads(body)["got"]) == (413, 2 << 40)
    assert service.by_asgi == 0


@pytest.mark.parametrize("case", EVALS)
async def test_training_gives_the_same_by_both_ways(service, case):
    body, media, headers = EVALS[case]
    headers += "Idempotency-Key: k\r\n"
    answers = []
    for name, way in (("bn", ""), ("bm", ORDINARY)):
        call = post(f"/v1/layers/{name}/train", body, media, headers + way)
        answers.append([comparable(got) for got in [*await service.ask(call), *await service.ask(call)]])
        answers[-1].append((await service.ask(get(f"/v1/layers/{name}/state", f"Accept: {SAFETENSORS}\r\n")))[0][2])
    again = json.dumps(answers[1], default=repr).replace("layers/bm/", "layers/bn/")
    assert json.dumps(answers[0], default=repr) == again


def moments(**changes):
    return {"count": np.array(4), "mean": np.array([1.0, 2.0]), "var": np.array([0.5, 3.0])} | changes


MOMENTS = {
    "safetensors": (save(moments()), SAFETENSORS, ""),
    "json": (b'{"count": 4, "mean": [1, 2], "var": [0.5, 3]}', JSON, ""),
    "float32": (save(moments(mean=np.float32([1, 2]))), SAFETENSORS, ""),
    "negative": (save(moments(var=np.array([-0.5, 3.0]))), SAFETENSORS, ""),
    "not finite": (save(moments(mean=np.array([np.nan, 3.0]))), SAFETENSORS, ""),
    "one value": (save(moments(count=np.array(1))), SAFETENSORS, ""),
    "channels": (save(moments(mean=np.array([1.0]))), SAFETENSORS, ""),
    "a tensor less": (b'{"count": 4, "mean": [1, 2]}', JSON, ""),
    "a tensor more": (save(moments(x=np.array([1.0]))), SAFETENSORS, ""),
    "no JSON": (b"{", JSON, ""),
    "another form": (b"", NPY, ""),
    "no form of the answer": (save(moments()), SAFETENSORS, "Accept: text/html\r\n"),
    "a bad key": (save(moments()), SAFETENSORS, "Idempotency-Key: a b\r\n"),
}


@pytest.mark.parametrize("case", MOMENTS)
async def test_moments_give_the_same_by_both_ways(service, case):
    body, media, headers = MOMENTS[case]
    headers = headers if "Key" in headers else headers + "Idempotency-Key: k\r\n"
    answers = []
    for name, way in (("bn", ""), ("bm", ORDINARY)):
        await service.ask(post(f"/v1/layers/{name}/eval", TENSORS, SAFETENSORS))  # now the layer is in memory
        service.by_asgi = 0
        call = post(f"/v1/layers/{name}/moments", body, media, headers + way)
        other = post(f"/v1/layers/{name}/moments", save(moments(count=np.array(5))), SAFETENSORS, headers + way)
        got = [(await service.ask(request))[0] for request in (call, call, other)]
        assert service.by_asgi == (0 if name == "bn" else 3)
        answers.append([comparable(one) for one in got])
        answers[-1].append((await service.ask(get(f"/v1/layers/{name}/state", f"Accept: {SAFETENSORS}\r\n")))[0][2])
    again = json.dumps(answers[1], default=repr).replace("layers/bm/", "layers/bn/")
    assert json.dumps(answers[0], default=repr) == again


async def test_without_the_fast_path_everything_comes_by_asgi(monkeypatch):
    async with serving(monkeypatch, fast_path=False) as service:
        for call in ("train", "eval", "inverse"):
            ((status, _, _),) = await service.ask(post(f"/v1/layers/bn/{call}", TENSORS, SAFETENSORS))
            assert status == 200
        assert service.by_asgi == 3


ORDERED = ("running_mean", "running_var", "weight", "bias")
STATES = {
    "safetensors": ("/v1/layers/bn/state", ""),
    "json": ("/v1/layers/bn/state", f"Accept: {JSON}\r\n"),
    "no form": ("/v1/layers/bn/state", "Accept: text/html\r\n"),
    "known": ("/v1/layers/bn/state", 'If-None-Match: "2"\r\n'),
    "known for any time": ("/v1/layers/bn/state?wait=0.01", 'If-None-Match: "2"\r\n'),
    "unknown": ("/v1/layers/bn/state?wait=60", 'If-None-Match: "1"\r\n'),
    "kept": ("/v1/layers/bn/state?at=1", ""),
    "not kept": ("/v1/layers/bn/state?at=9", ""),
    "no such layer": ("/v1/layers/none/state", ""),
    "no name": ("/v1/layers/-/state", ""),
    "a document": ("/v1/layers/bn", ""),
    "a known document": ("/v1/layers/bn", 'If-None-Match: "2"\r\n'),
    "several": ("/v1/state?names=bn,bm", ""),
    "several that are known": ("/v1/state?prefix=b", "If-None-Match: *\r\n"),
    "several that are not there": ("/v1/state?names=bn,none", ""),
    "all": ("/v1/state?prefix=b", ""),
    "a parameter": ("/v1/state?names=bn&x=1", ""),
    "a fragment": ("/v1/state?names=bn#x", ""),
    "an escape": ("/v1/state?names=b%6E", ""),
    "a body": ("/v1/state?names=bn", "Content-Length: 0\r\n"),
}


@pytest.mark.parametrize("case", STATES)
async def test_states_are_read_the_same_by_both_ways(service, case):
    path, headers = STATES[case]
    await service.ask(post("/v1/layers/bn/train", TENSORS, SAFETENSORS))
    (direct,) = await service.ask(get(path, headers))
    assert service.by_asgi == (case in {"a fragment", "no name"})
    (ordinary,) = await service.ask(get(path, headers + ORDINARY))
    assert comparable(direct) == comparable(ordinary)


WEIGHT = np.float32([1, 2])
MOMENTS_OF_BN = {"bn.count": 4, "bn.mean": [1.0, 2.0], "bn.var": [0.5, 3.0]}
MANY = {
    "moments": ("POST", "/v1/moments", MOMENTS_OF_BN, ""),
    "a key": ("POST", "/v1/moments", MOMENTS_OF_BN, "Idempotency-Key: k\r\n"),
    "a bad key": ("POST", "/v1/moments", {}, "Idempotency-Key: a b\r\n"),
    "a layer that refuses": ("POST", "/v1/moments", MOMENTS_OF_BN | {"none.count": 4}, ""),
    "moments that are not known": ("POST", "/v1/moments", {"bn.x": 4}, ""),
    "a query": ("POST", "/v1/moments?statistics=true", MOMENTS_OF_BN, ""),
    "parameters": ("PUT", "/v1/state", {"bn.weight": WEIGHT, "bm.bias": WEIGHT}, ""),
    "one that is refused": ("PUT", "/v1/state", {"bn.weight": WEIGHT, "no.bias": WEIGHT, "bm.bias": [3.0]}, ""),
    "a bad version": ("PUT", "/v1/state", {"bn.weight": WEIGHT}, "If-Match: 9\r\n"),
}


@pytest.mark.parametrize("case", MANY)
async def test_calls_on_many_layers_give_the_same_by_both_ways(monkeypatch, case):
    method, path, tensors, headers = MANY[case]
    body = save({name: np.asarray(value) for name, value in tensors.items()})
    answers = []
    for way in ("", ORDINARY):
        async with serving(monkeypatch) as service:
            call = post(path, body, SAFETENSORS, headers + way + "X-Request-ID: mine\r\n")
            call = call.replace(b"POST", method.encode(), 1)
            answers.append([comparable(got) for got in [*await service.ask(call), *await service.ask(call)]])
            assert service.by_asgi == (2 if way or (case == "moments with a query" and way) else 0)
            for name in ("bn", "bm"):
                ((_, _, document),) = await service.ask(get(f"/v1/layers/{name}"))
                answers[-1].append({key: json.loads(document)[key] for key in ("version", *ORDERED)})
    assert answers[0] == answers[1]


async def test_answers_come_in_order_also_after_one_that_waits(service):
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(get("/v1/layers/bn/state?wait=60", 'If-None-Match: "1"\r\n') + get("/v1/layers/bm"))
    watches = service.gateway.app.state.layers.states.watches
    await until(lambda: watches.waiting == 1)
    await service.ask(post("/v1/layers/bn/train", TENSORS, SAFETENSORS))
    first, second = [await answer(reader) for _ in range(2)]
    assert (first[0], first[1]["etag"] != '"1"') == (200, True)
    assert json.loads(second[2])["name"] == "bm"
    writer.close()


async def test_a_wait_ends_when_the_server_stops(service):
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(get("/v1/layers/bn/state?wait=60", 'If-None-Match: "1"\r\n'))
    watches = service.gateway.app.state.layers.states.watches
    await until(lambda: watches.waiting == 1)
    (protocol,) = [each for each in service.state.connections if each.cycle is not None]
    protocol.shutdown()
    status, headers, _ = await answer(reader)
    assert (status, headers["connection"], await reader.read()) == (304, "close", b"")
    writer.close()


async def test_moments_are_folded(service):
    await service.ask(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS))  # now the layer is in memory
    ((status, _, document),) = await service.ask(post("/v1/layers/bn/moments", save(moments()), SAFETENSORS))
    assert (status, json.loads(document)) == (200, {"version": 2, "num_batches_tracked": 1})
    ((_, _, layer),) = await service.ask(get("/v1/layers/bn"))
    # torch: (1 - momentum) * running + momentum * batch, with the unbiased variance
    np.testing.assert_allclose(json.loads(layer)["running_mean"], [0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(json.loads(layer)["running_var"], [0.9 + 0.05 * 4 / 3, 0.9 + 0.3 * 4 / 3], rtol=1e-6)


@pytest.mark.parametrize(("path", "by_asgi"), [("none/eval", 0), ("none/train", 0), ("a%2Fb/eval", 1), ("-/train", 1)])
async def test_a_layer_that_is_not_there(service, path, by_asgi):
    path = f"/v1/layers/{path}"
    (direct,) = await service.ask(post(path, TENSORS, SAFETENSORS))
    assert service.by_asgi == by_asgi
    (ordinary,) = await service.ask(post(path, TENSORS, SAFETENSORS, ORDINARY))
    assert comparable(direct) == comparable(ordinary)
    assert direct[0] in {404, 422}


async def test_a_guard_stands_on_both_ways(monkeypatch):
    async with serving(monkeypatch, token="all", read_token="look") as service:
        for given, status in (
            ("", 401),
            ("Authorization: Bearer no\r\n", 401),
            ("Authorization: Bearer look\r\n", 403),
        ):
            (direct,) = await service.ask(post("/v1/layers/bn/train", TENSORS, SAFETENSORS, given))
            assert direct[0] == status
            (ordinary,) = await service.ask(post("/v1/layers/bn/train", TENSORS, SAFETENSORS, given + ORDINARY))
            assert comparable(direct) == comparable(ordinary)
        assert service.by_asgi == 6


async def test_an_eval_of_a_cached_layer_needs_no_task(service, monkeypatch):
    await service.ask(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS))  # now the layer is in memory
    monkeypatch.setattr(eager, "_Started", None)
    answers = await service.ask(*[post("/v1/layers/bn/eval", TENSORS, SAFETENSORS)] * 2)
    assert [status for status, _, _ in answers] == [200, 200]


async def test_an_unexpected_error_is_answered_and_its_call_counted_no_longer(service, monkeypatch):
    await service.ask(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS))

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(moments_source, "train_step", no_memory)
    ((status, _, body),) = await service.ask(post("/v1/layers/bn/train", TENSORS, SAFETENSORS))
    assert (status, json.loads(body)["type"]) == (500, "/problems/internal-error")
    assert service.gateway.running == 0


@pytest.mark.parametrize(
    ("broken", "path", "body"),
    [
        (moments_source.BatchSource, "/v1/layers/bn/train", TENSORS),
        (moments_source.PostedSource, "/v1/layers/bn/moments", save(moments())),
    ],
)
async def test_a_bug_on_the_fast_path_is_no_slow_success(service, monkeypatch, caplog, broken, path, body):
    """Whatever went wrong there, the call was begun anew on the other way, and nobody heard of it."""
    await service.ask(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS))
    compute = broken.compute

    async def fails_once(*arguments):
        monkeypatch.setattr(broken, "compute", compute)
        raise KeyError("a planted bug")

    monkeypatch.setattr(broken, "compute", fails_once)
    first, second = await service.ask(
        post(path, body, SAFETENSORS, "X-Request-ID: mine\r\n"), post(path, body, SAFETENSORS)
    )
    problem = json.loads(first[2])
    assert (first[0], problem["type"], problem["request_id"]) == (500, "/problems/internal-error", "mine")
    assert first[1]["x-request-id"] == "mine"
    assert "a planted bug" not in str(problem)
    assert "request mine failed" in caplog.text
    assert "a planted bug" in caplog.text
    assert (second[0], service.gateway.running) == (200, 0)
    ((_, _, layer),) = await service.ask(get("/v1/layers/bn"))
    assert json.loads(layer)["num_batches_tracked"] == 1


async def test_who_waits_for_a_commit_while_the_server_stops_is_told(service, monkeypatch):
    await service.ask(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS))
    forever = asyncio.Event()

    async def commit(*_):
        await forever.wait()
        return Missing()

    monkeypatch.setattr(MemoryStore, "commit", commit)
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(post("/v1/layers/bn/train", TENSORS, SAFETENSORS))
    await until(lambda: service.state.tasks)
    for task in service.state.tasks:
        task.cancel(msg="as uvicorn does")
    status, _, body = await answer(reader)
    assert (status, json.loads(body)["type"]) == (503, "/problems/store-unavailable")
    assert not service.state.tasks
    forever.set()
    writer.close()


@pytest.mark.parametrize(
    "headers",
    [ORDINARY, "Connection: close\r\n", "Expect: 100-continue\r\n"],
)
async def test_what_asks_the_server_for_something_goes_by_asgi(service, headers):
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS, headers))
    if "100" in headers:
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert (await answer(reader))[0] == 200
    assert service.by_asgi == 1
    writer.close()


@pytest.mark.parametrize("value", ["keep-alive", "Keep-Alive"])
async def test_a_client_that_asks_for_what_http_does_anyway_goes_the_direct_way(service, value):
    call = post("/v1/layers/bn/eval", TENSORS, SAFETENSORS, f"Connection: {value}\r\n")
    assert [status for status, *_ in await service.ask(call, call)] == [200, 200]
    assert service.by_asgi == 1  # the second, because it was pipelined


async def test_python_clients_go_the_direct_way(service):
    async with AsyncClient(f"http://127.0.0.1:{service.port}") as client:
        layer = client.layer("bn")
        await layer.train(BATCH)
        await layer.eval(BATCH)
        assert service.by_asgi == 0
    async with httpx.AsyncClient() as bare:
        answer = await bare.post(
            f"http://127.0.0.1:{service.port}/v1/layers/bn/eval", content=TENSORS, headers={"Content-Type": SAFETENSORS}
        )
        assert (answer.status_code, service.by_asgi) == (200, 0)


async def test_other_requests_go_by_asgi(service):
    chunked = post("/v1/layers/bn/eval", b"", JSON).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunked += b"%x\r\n%b\r\n0\r\n\r\n" % (len(as_json([[1, 2]])), as_json([[1, 2]]))
    query = post("/v1/layers/bn/eval?statistics=false", as_json([[1, 2]]))
    old = post("/v1/layers/bn/eval", as_json([[1, 2]])).replace(b"HTTP/1.1", b"HTTP/1.0")
    lasting = post("/v1/layers/bn/eval", as_json([[1, 2]]), JSON, "Connection: keep-alive\r\n")
    lasting = lasting.replace(b"HTTP/1.1", b"HTTP/1.0")
    for count, request in enumerate([chunked, query, old, lasting], 1):
        assert (await service.ask(request))[0][0] == 200
        assert service.by_asgi == count
    assert (await service.ask(b"GET /v1/layers/bn/eval HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"))[0][0] == 405


async def test_a_body_in_pieces(service):
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    request = post("/v1/layers/bn/eval", TENSORS, SAFETENSORS)
    for piece in (request[:20], request[20:150], request[150:-1], request[-1:]):
        writer.write(piece)
        await asyncio.sleep(0.01)
    assert (await answer(reader))[0] == 200
    assert service.by_asgi == 0
    writer.close()


async def test_who_leaves_in_the_middle_of_a_body_is_counted_no_longer(service):
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(post("/v1/layers/bn/train", TENSORS, SAFETENSORS)[:-1])
    await until(lambda: service.gateway.transfers.buffered == len(TENSORS) - 1)
    assert service.gateway.running == 0  # it runs from the end of its body on
    writer.close()
    await until(lambda: service.gateway.transfers.buffered == 0)
    assert service.by_asgi == 0


@pytest.mark.parametrize("way", ["", ORDINARY])
async def test_no_more_calls_run_than_may(monkeypatch, way):
    async with serving(monkeypatch, max_concurrent_requests=1) as service:
        shard = post("/v1/layers/bm/train?group=g&size=2", TENSORS, SAFETENSORS)  # waits for the other
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(shard)
        await until(lambda: service.gateway.running == 1)
        ((status, headers, _),) = await service.ask(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS, way))
        assert (status, headers["retry-after"]) == (503, "1")
        ((status, *_),) = await service.ask(get("/v1/layers"))
        assert status == 503
        writer.close()
        await until(lambda: service.gateway.running == 0)
        ((status, *_),) = await service.ask(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS, way))
        assert status == 200


async def test_pipelined_requests_are_answered_in_order(service):
    train, look = post("/v1/layers/bn/train", TENSORS, SAFETENSORS), get("/v1/layers/bn")
    answers = await service.ask(train, look, train, post("/v1/layers/bn/eval", TENSORS, SAFETENSORS), look)
    assert [status for status, _, _ in answers] == [200] * 5
    assert [headers.get("num-batches-tracked", "-") for _, headers, _ in answers] == ["1", "-", "2", "2", "-"]
    assert [json.loads(answers[n][2])["num_batches_tracked"] for n in (1, 4)] == [1, 2]


@pytest.mark.slow
async def test_who_does_not_read_is_not_written_to_without_end(service):
    batch = save({"input": np.zeros((1024, 2), np.float32)})
    request, loop = post("/v1/layers/bn/eval", batch, SAFETENSORS), asyncio.get_running_loop()
    await service.ask(request)
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.setblocking(False)
        with contextlib.suppress(TimeoutError):
            for _ in range(50_000):  # 400 MiB, more than the kernel keeps
                await asyncio.wait_for(loop.sock_sendall(connection, request), 2)
            pytest.fail("the service took all that it was sent")


async def test_a_caller_that_leaves_is_not_waited_for(service):
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(post("/v1/layers/bn/train", TENSORS, SAFETENSORS))
    await writer.drain()
    writer.transport.abort()

    async def has_come():
        ((_, _, layer),) = await service.ask(get("/v1/layers/bn"))
        return json.loads(layer)["num_batches_tracked"] == 1

    await until(has_come)
    await until(lambda: not service.state.connections)
    assert not service.state.tasks


async def test_a_connection_that_is_idle_for_too_long_is_closed(service):
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS))
    await answer(reader)
    (protocol,) = service.state.connections
    protocol._check_idle()  # too early: it is looked at again
    writer.write(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS))
    await answer(reader)
    protocol.timeout_keep_alive = 0
    protocol._check_idle()
    assert await reader.read() == b""
    writer.close()


async def test_a_request_is_not_idle_because_the_one_before_it_is_answered(service):
    await service.ask(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS))
    shard = "/v1/layers/bn/train?group=g&size=2"
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(post("/v1/layers/bn/eval", TENSORS, SAFETENSORS) + post(shard, TENSORS, SAFETENSORS))
    assert (await answer(reader))[0] == 200
    (protocol,) = service.state.connections
    protocol.timeout_keep_alive = 0
    protocol._check_idle()
    assert (await service.ask(post(shard, TENSORS, SAFETENSORS)))[0][0] == 200
    assert (await answer(reader))[0] == 200
    writer.close()


async def test_who_leaves_with_requests_under_way_leaves_no_trace(service, caplog):
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(post("/v1/layers/bn/train", TENSORS, SAFETENSORS) * 3)
    await writer.drain()
    writer.transport.abort()
    await until(lambda: not service.state.connections and not service.state.tasks)
    assert caplog.text == ""
