"""A running service whose SQLite file is deleted or replaced: 503 for all that needs it, and never a second history."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import httpx
import pytest

from store.valkey_servers import wait_for

from .test_workers import worker_pids

BATCH = {"input": [[1.0, 2.0], [3.0, 5.0]]}
CALLS = [
    ("PUT", "/v1/layers/bn", {"num_features": 2}),
    ("POST", "/v1/layers/bn/train", BATCH),
    ("POST", "/v1/layers/bn/eval", BATCH),
    ("GET", "/v1/layers/bn", None),
    ("GET", "/v1/layers", None),
    ("DELETE", "/v1/layers/bn", None),
    ("GET", "/readyz", None),
]


def lose(path, how):
    if how == "replaced":
        shutil.copyfile(path, other := path.with_name("other"))
        other.rename(path)
    elif how == "moved":
        path.parent.rename(path.parent.with_name("moved"))
    else:
        path.unlink()


def ask(url, method, path, body=None):
    """The status and the problem's name, over a connection of its own."""
    answer = httpx.request(method, f"{url}{path}", json=body, timeout=60)
    problem = answer.json().get("type", "") if answer.status_code >= 400 else ""
    return answer.status_code, problem.removeprefix("/problems/")


def ready(url):
    """What `/readyz` answers, or that whoever took the connection has just ended."""
    try:
        return ask(url, "GET", "/readyz")[0]
    except httpx.HTTPError:
        return None


@pytest.fixture
def start_workers(start):
    """Two workers, which are ended before their supervisor: it would leave them behind when it is killed."""
    with contextlib.ExitStack() as stack:

        def start_workers(*arguments):
            service = start(*arguments, "--workers", "2")

            def end():
                if service.process.poll() is None:
                    service.process.send_signal(signal.SIGSTOP)
                    for pid in worker_pids(service.process.pid):
                        os.kill(pid, signal.SIGKILL)

            stack.callback(end)
            return service

        yield start_workers


@pytest.fixture
def path(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "layers.db"


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved"])
def test_a_process_answers_503_until_it_is_restarted(start, path, how):
    service = start("--store", f"sqlite:///{path}")
    for method, route, body in CALLS[:5]:
        assert ask(service.url, method, route, body)[0] in (200, 201)
    lose(path, how)
    assert ask(service.url, "GET", "/readyz") == (503, "store-unavailable")
    for call in CALLS:
        assert ask(service.url, *call) == (503, "store-unavailable"), call
    assert ask(service.url, "GET", "/healthz") == (200, "")
    there = path.read_bytes() if how == "replaced" else path.exists()
    assert service.stop() == 0
    assert (path.read_bytes() if how == "replaced" else path.exists()) == there
    assert "was deleted, moved or replaced" in service.output


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="workers are found in Linux's /proc")
@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_no_worker_serves_another_file_than_the_first_ones(start_workers, path, how):
    """Seen: a worker that came back made a new, empty file, and one port served two histories."""
    service = start_workers("--store", f"sqlite:///{path}")
    for method, route, body in CALLS[:5]:
        assert ask(service.url, method, route, body)[0] in (200, 201)
    first = worker_pids(service.process.pid)
    os.kill(min(first), signal.SIGKILL)  # one that comes back while all is well is welcome
    wait_for("a killed worker is replaced", lambda: len(worker_pids(service.process.pid) - first) == 1)
    wait_for("it serves", lambda: all(ready(service.url) == 200 for _ in range(8)))

    lose(path, how)
    there = path.read_bytes() if how == "replaced" else None
    workers = worker_pids(service.process.pid)
    victim = max(workers - first)
    os.kill(victim, signal.SIGKILL)
    wait_for("the other one notices", lambda: ready(service.url) == 503)
    for call in CALLS * 3:
        assert ask(service.url, *call) == (503, "store-unavailable"), call
    assert worker_pids(service.process.pid) <= workers - {victim}, "none is started any more"
    os.kill(*(workers - {victim}), signal.SIGKILL)
    assert service.wait() == 1
    assert "no worker that had it open is left" in service.output
    assert "Traceback" not in service.output
    assert (path.read_bytes() if how == "replaced" else None) == there
    assert path.exists() == (how == "replaced")
