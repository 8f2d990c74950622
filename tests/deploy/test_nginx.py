"""nginx.conf of deploy/: a real nginx takes it, and nothing gets smaller, shorter or done twice by it."""

import contextlib
import io
import re
import socket
import subprocess
import threading

import httpx
import numpy as np
import pytest

from batchnorm_service.app import create_app
from batchnorm_service.settings import Settings

from .balancer import balancing, command, needs_nginx
from .files import DEFAULTS, DEPLOY, compose, seconds

TEXT = (DEPLOY / "nginx.conf").read_text()
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def value(name):
    """The arguments of a directive."""
    return re.search(rf"^\s*{name} ([^;]+);", TEXT, re.M)[1].split()


def test_its_limits_are_not_smaller_than_the_services():
    assert value("client_max_body_size") == ["0"]
    count, size, unit = re.fullmatch(r"(\d+) (\d+)(k?)", " ".join(value("large_client_header_buffers"))).groups()
    assert int(size) * UNITS[unit] >= max(DEFAULTS.max_header_bytes, DEFAULTS.max_url_bytes)
    assert int(count) >= 2  # a request line and a header of this size
    for name in ("client_header_timeout", "client_body_timeout"):
        assert seconds(*value(name)) > DEFAULTS.read_timeout_seconds
    for name in ("send_timeout", "proxy_send_timeout"):
        assert seconds(*value(name)) > DEFAULTS.write_timeout_seconds
    connections = int(*value("worker_connections"))
    assert connections >= 2 * (DEFAULTS.max_waiting_calls + DEFAULTS.max_concurrent_requests)
    assert int(*value("worker_rlimit_nofile")) >= connections
    assert compose()["services"]["balancer"]["ulimits"]["nofile"] >= int(*value("worker_rlimit_nofile"))


def test_it_waits_as_long_as_a_call_may():
    document = create_app(Settings(store="memory:")).app.openapi()
    longest = {}
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in {"wait", "timeout"} and parameter["in"] == "query":
                    longest[parameter["name"]] = parameter["schema"]["maximum"]
    assert longest.keys() == {"wait", "timeout"}
    assert seconds(*value("proxy_read_timeout")) >= max(longest.values()) + DEFAULTS.store_timeout_seconds


def test_idle_connections_are_closed_by_nginx_first():
    """Or a call would meet a connection that the service is closing."""
    upstream = TEXT.partition("upstream replicas {")[2].partition("}")[0]
    idle = re.search(r"keepalive_timeout (\w+);", upstream)[1]
    assert seconds(idle) < DEFAULTS.keep_alive_seconds
    servers = re.findall(r"^\s*server (\S+):(\d+) ", upstream, re.M)
    replicas = [name for name in compose()["services"] if name.startswith("replica")]
    assert servers == [(name, str(DEFAULTS.port)) for name in replicas]


@pytest.mark.slow
@needs_nginx
def test_nginx_takes_it(tmp_path):
    words = command(tmp_path, 8080, [8001, 8002, 8003])
    done = subprocess.run([*words, "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\[(warn|emerg|error)\]", done.stderr), done.stderr


@pytest.mark.slow
@needs_nginx
def test_large_requests_get_the_services_answers(start, tmp_path):
    service = start("--store", "memory:", BATCHNORM_MAX_BODY_BYTES=str(4 << 20))
    port = int(service.url.rpartition(":")[2])
    with balancing(tmp_path / "nginx", [port] * 3) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.put("/v1/layers/wide", json={"num_features": 1024}).raise_for_status()
        file = io.BytesIO()
        np.save(file, np.arange(768 * 1024, dtype=np.float32).reshape(768, 1024))
        batch = file.getvalue()
        headers = {"Content-Type": "application/x-npy"}
        trained = client.post("/v1/layers/wide/train", content=batch, headers=headers)
        assert (trained.status_code, len(trained.content)) == (200, len(batch))
        refused = client.post("/v1/layers/wide/train", content=bytes(5 << 20), headers=headers)
        assert refused.status_code == 413
        assert refused.json()["type"] == "/problems/payload-too-large"
        long = ",".join(f"{number:0199}" for number in range(140))  # a URL of 28 KiB
        assert client.get(f"/v1/state?names={long}").json()["type"] == "/problems/layer-not-found"
        longer = client.get("/readyz", headers={"X-Padding": "x" * 60_000})
        assert longer.status_code == 200
        named = client.get("/readyz", headers={"X-Request-ID": "mine"})
        assert named.headers["X-Request-ID"] == "mine"


class Breaking:
    """A server that reads a request and closes the connection, on a free port.

    Attributes:
        requests: their first lines.
    """

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.requests = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    self.requests.append(connection.recv(1 << 16).partition(b"\r\n")[0].decode())

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=30)


@pytest.fixture
def breaking():
    servers = [Breaking() for _ in range(3)]
    yield servers
    for server in servers:
        server.close()


@pytest.mark.slow
@needs_nginx
@pytest.mark.parametrize(
    ("method", "times"), [("GET", 3), ("HEAD", 3), ("POST", 1), ("PATCH", 1), ("PUT", 1), ("DELETE", 1)]
)
def test_what_may_have_taken_effect_is_not_sent_again(tmp_path, breaking, method, times):
    with balancing(tmp_path / "nginx", [server.port for server in breaking]) as url:
        answer = httpx.request(method, f"{url}/v1/layers/obs", content=b"{}" if method.startswith("P") else None)
    assert answer.status_code == 502
    assert [line for server in breaking for line in server.requests] == [f"{method} /v1/layers/obs HTTP/1.1"] * times


@pytest.mark.slow
@needs_nginx
def test_a_replica_that_does_not_listen_is_passed_over(start, tmp_path):
    service = start("--store", "memory:")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refusing = closed.getsockname()[1]
    port = int(service.url.rpartition(":")[2])
    with balancing(tmp_path / "nginx", [refusing, port, refusing]) as url:
        httpx.put(f"{service.url}/v1/layers/obs", json={"num_features": 1})
        body = {"input": [[1], [2]]}
        answers = [httpx.post(f"{url}/v1/layers/obs/train", json=body).json() for _ in range(10)]
        assert [answer["num_batches_tracked"] for answer in answers] == list(range(1, 11))
        assert httpx.get(f"{url}/v1/layers/obs").json()["num_batches_tracked"] == 10
