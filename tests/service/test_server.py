"""A real server and real sockets: stopping, early refusals, bodies in pieces."""

import errno
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, save

from store.valkey_servers import free_port, wait_for

from .conftest import Process, environment

HEAD = b"POST /v1/layers/bn/train HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def create(http, url, name="bn", features=2):
    http.put(f"{url}/v1/layers/{name}", json={"num_features": features}).raise_for_status()
    return f"{url}/v1/layers/{name}"


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def connection_error(url):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2])))


def read_answer(connection):
    """Status, headers and body of the next answer on this connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536) or pytest.fail(f"closed after {data!r}")
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return int(status.split()[1]), headers, body


@pytest.fixture(scope="module")
def plain():
    """The address of a service that several tests call, and none stops."""
    process = Process("--store", "memory:")
    try:
        assert process.url, process.output
        yield process.url
    finally:
        process.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_what_is_in_flight_and_exits_0(start, store, http, number):
    process = start("--store", store)
    layer = create(http, process.url)
    http.close()
    body = b'{"input": [[1, 2], [3, 4]]}'
    with connect(process.url) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert read_answer(connection)[0] == 100  # so it waits for the body
        connection.sendall(body[:10])
        process.process.send_signal(number)
        wait_for("it stops", lambda: connection_error(process.url) == errno.ECONNREFUSED)
        assert process.process.poll() is None
        connection.sendall(body[10:])
        status, headers, _ = read_answer(connection)
    assert (status, headers["num-batches-tracked"]) == (200, "1")
    assert headers["connection"] == "close"
    assert process.wait() == 0
    assert "Traceback" not in process.output
    assert layer.startswith(process.url)

    again = start("--store", store)
    with connect(again.url) as connection:
        connection.sendall(b"GET /v1/layers/bn HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b'"num_batches_tracked":1,' in read_answer(connection)[2]
    assert again.stop() == 0


def test_a_stop_under_load_loses_no_answered_batch(start, store, http):
    process = start("--store", store)
    layer = create(http, process.url)
    answered = []

    def train():
        with httpx.Client(timeout=30) as client:
            while True:
                try:
                    answer = client.post(f"{layer}/train", json={"input": [[1, 2], [3, 4]]})
                except httpx.TransportError:
                    return
                answer.raise_for_status()
                answered.append(answer.json()["num_batches_tracked"])

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for("some are answered", lambda: len(answered) > 100)
    assert process.stop() == 0
    for thread in threads:
        thread.join()
    assert len(set(answered)) == len(answered) > 0
    again = start("--store", store)
    assert http.get(layer.replace(process.url, again.url)).json()["num_batches_tracked"] >= len(answered)


def test_a_stop_does_not_wait_forever(start):
    process = start("--store", "memory:", BATCHNORM_SHUTDOWN_SECONDS="1")
    with connect(process.url) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n")
        assert read_answer(connection)[0] == 100  # so it waits for the body
        assert process.stop() == 0
        status, headers, body = read_answer(connection)
    assert status == 503
    assert headers["retry-after"]
    assert b"/problems/store-unavailable" in body
    assert "Traceback" not in process.output


def test_a_second_interrupt_stops_at_once_and_quietly(start):
    """It printed the traceback of a CancelledError; one that came still later ended the process with status -2."""
    process = start("--store", "memory:")
    printed = process.output
    with connect(process.url) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n")
        assert read_answer(connection)[0] == 100  # so it waits for the body
        process.process.send_signal(signal.SIGINT)
        wait_for("it stops", lambda: connection_error(process.url) == errno.ECONNREFUSED)
        process.process.send_signal(signal.SIGINT)
        assert read_answer(connection)[0] == 503
    while process.process.poll() is None:
        process.process.send_signal(signal.SIGINT)  # whenever this comes
        time.sleep(0.005)
    assert process.wait() == 0
    (line,) = [json.loads(line) for line in process.output.removeprefix(printed).splitlines()]
    assert (line["outcome"], line["status"]) == ("store-unavailable", 503)


def test_an_idle_connection_does_not_hold_up_a_stop(start):
    process = start("--store", "memory:")
    with connect(process.url) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers, _ = read_answer(connection)
        assert (status, "date" in headers, "server" in headers) == (200, True, False)
        since = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - since < 5


def test_the_connection_is_usable_after_an_early_refusal(start):
    process = start("--store", "memory:", BATCHNORM_MAX_BODY_BYTES="100000")
    body = b"x" * 1_000_000
    with connect(process.url) as connection:
        for head in (f"Content-Length: {len(body)}\r\n\r\n".encode(), b"Transfer-Encoding: chunked\r\n\r\n"):
            chunked = b"Transfer" in head
            connection.sendall(HEAD + head)
            connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body)
            status, headers, answer = read_answer(connection)
            assert (status, headers["content-type"]) == (413, "application/problem+json")
            assert b"payload-too-large" in answer
            assert headers["x-request-id"]
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(connection)[0] == 200


def test_a_refusal_before_100_continue_closes_the_connection(plain):
    with connect(plain) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n")
        status, headers, _ = read_answer(connection)
        assert (status, headers["connection"]) == (413, "close")
        assert connection.recv(1) == b""


def test_large_bodies_in_both_directions(plain, http):
    layer = create(http, plain, "large", features=64)
    batch = np.random.default_rng(0).normal(5, 2, size=(32768, 64)).astype(np.float32)
    headers = {"Content-Type": "application/vnd.safetensors"}
    answer = http.post(f"{layer}/train", content=save({"input": batch}), headers=headers)
    assert answer.status_code == 200
    output = load(answer.content)["output"]
    np.testing.assert_allclose(output, (batch - batch.mean(0)) / batch.std(0), atol=1e-3)

    def chunks():
        data = save({"input": batch})
        for start_ in range(0, len(data), 100_000):
            yield data[start_ : start_ + 100_000]

    again = http.post(f"{layer}/eval", content=chunks(), headers=headers)  # without a Content-Length
    assert load(again.content)["output"].shape == batch.shape


def test_an_unknown_method_is_answered(plain, http):
    assert http.request("PROPFIND", f"{plain}/v1/layers").status_code == 405


REQUESTS = [
    ("PUT", "", {"num_features": 2}),
    ("POST", "/train", {"input": [[1, 2], [3, 4]]}),
    ("POST", "/train?statistics=true", {"input": [[1, 2], [3, 4]]}),
    ("POST", "/eval", {"input": [[1, 2]]}),
    ("POST", "/inverse", {"input": [[1, 2]]}),
    ("POST", "/backward", {"input": [[1, 2], [3, 4]], "grad_output": [[1, 2], [3, 4]]}),
    ("POST", "/moments", {"count": 2, "mean": [1, 2], "var": [3, 4]}),
    ("POST", "/eval", {"input": [[1, 2, 3]]}),
    ("POST", "/eval", {"inputs": []}),
    ("PATCH", "", {"weight": [2, 3]}),
    ("POST", "/reset", {"what": "parameters"}),
    ("GET", "/state", None),
    ("OPTIONS", "/train", None),
    ("DELETE", "", None),
    ("GET", "", None),
]


def responses(http, url):
    """What differs by nothing but the time, the id of a request, and that of a state."""
    for method, call, document in REQUESTS:
        response = http.request(method, f"{url}/v1/layers/bn{call}", json=document, headers={"X-Request-ID": "same"})
        headers = {name: value for name, value in response.headers.items() if name not in {"date", "server"}}
        if call == "/state":
            assert re.fullmatch(r'"6-[0-9a-f]{1,16}"', headers.pop("etag"))  # a random number of the commit
        yield response.status_code, headers, re.sub(rb'"\w+_at":"[^"]*"', b"", response.content)


def test_plain_uvicorn_serves_the_same_api(start, http, store, tmp_path):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--factory", "batchnorm_service.app:create_app", "--port", str(port)],
        env=environment(BATCHNORM_STORE=store),
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for("it listens", lambda: connection_error(f"http://127.0.0.1:{port}") == 0)
        assert [*responses(http, f"http://127.0.0.1:{port}")] == [*responses(http, start("--store", "memory:").url)]
        assert (tmp_path / "layers.db").exists()
    finally:
        process.terminate()
        process.wait(timeout=30)


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAA\r\n"
BATCH = b'{"input": [[1, 2], [3, 4]]}'
SIZED = b"Content-Length: %d\r\n\r\n%b" % (len(BATCH), BATCH)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BATCH), BATCH)
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
EVAL = HEAD.replace(b"train", b"eval")


@pytest.fixture(scope="module")
def upgrading():
    """The address of a service that has the layer `bn`, with what it has printed when all tests are done."""
    process = Process("--store", "memory:")
    with httpx.Client() as http:
        create(http, process.url)
    yield process.url
    process.stop()
    assert "pgrade" not in process.output
    assert "Invalid" not in process.output
    process.close()


def in_pieces(connection, data, number):
    """Send data so that the other side most likely sees this many pieces."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    size = -(-len(data) // number)
    for start in range(0, len(data), size):
        connection.sendall(data[start : start + size])
        time.sleep(0.05 if number < len(data) else 0)


@pytest.mark.parametrize("body", [SIZED, CHUNKED], ids=["sized", "chunked"])
@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_an_offer_to_upgrade_is_ignored(upgrading, body, pieces):
    """Java's client and `curl --http2` offer HTTP/2 with a body; such a body was lost, and the answer was 400."""
    with connect(upgrading) as connection:
        for _ in range(2):  # the second time on a connection that was used
            in_pieces(connection, EVAL + OFFER + body, pieces)
            status, headers, answer = read_answer(connection)
            assert (status, headers["content-type"]) == (200, "application/json")
            np.testing.assert_allclose(json.loads(answer)["output"], [[1, 2], [3, 4]], rtol=1e-4)
            connection.sendall(EVAL + body)
            assert read_answer(connection)[2] == answer


def test_offers_to_upgrade_in_a_row_are_answered_in_order(upgrading):
    with connect(upgrading) as connection, connection.makefile("rb") as answers:
        connection.sendall((EVAL + OFFER + SIZED + HEALTH + EVAL + OFFER + CHUNKED + EVAL + SIZED) * 200)
        for _ in range(200):
            for start in (b'{"output"', b'{"status"', b'{"output"', b'{"output"'):
                assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
                head = b"".join(iter(answers.readline, b"\r\n"))
                assert answers.read(int(re.search(rb"content-length: (\d+)", head)[1])).startswith(start)


def test_a_head_that_begins_behind_many_requests_is_not_too_large(upgrading):
    """The whole piece that it came in was taken for its length."""
    with connect(upgrading) as connection, connection.makefile("rb") as answers:
        connection.sendall((EVAL + SIZED) * 900 + HEALTH[:10])
        for number in range(901):
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            head = b"".join(iter(answers.readline, b"\r\n"))
            answers.read(int(re.search(rb"content-length: (\d+)", head)[1]))
            if number == 899:
                connection.sendall(HEALTH[10:])


@pytest.mark.parametrize(
    ("offer", "connection_header"),
    [(OFFER.replace(b"Settings\r", b"Settings, close\r", 1), "close"), (b"Expect: 100-continue\r\n" + OFFER, None)],
)
def test_what_else_is_asked_with_an_offer_is_done(upgrading, offer, connection_header):
    with connect(upgrading) as connection:
        head, _, body = (EVAL + offer + SIZED).partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        if b"Expect" in offer:
            assert read_answer(connection)[0] == 100
        connection.sendall(body)
        status, headers, _ = read_answer(connection)
        assert (status, headers.get("connection")) == (200, connection_header)


def test_a_websocket_is_an_ordinary_request(upgrading):
    offer = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    with connect(upgrading) as connection:
        for path, expected in ((b"/healthz", 200), (b"/v1/layers/nothing", 404), (b"/ws", 404)):
            connection.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (path, offer))
            status, _, answer = read_answer(connection)
            connection.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
            plain = read_answer(connection)
            assert (status, answer) == (plain[0], plain[2])
            assert status == expected


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"garbage\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nX-Long: " + b"x" * 200_000, 413),
        (b"GET /healthz HTTP/1.1\r\n" + OFFER + b"X-Long: " + b"x" * 200_000, 413),
        (b"CONNECT x:80 HTTP/1.1\r\n" + OFFER + b"\r\n", 400),
    ],
)
def test_what_is_no_request_gets_a_problem_with_a_request_id(plain, sent, status):
    """uvicorn answers such in plain text, and keeps reading a header that never ends."""
    port = int(plain.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"x-request-id: " in head
    assert json.loads(body)["status"] == status
