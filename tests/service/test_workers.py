"""Several processes over one store: every acknowledged batch counts once, whatever is killed and repeated."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from store import valkey_servers
from store.valkey_servers import free_port, wait_for

from .traffic import KILLS, Traffic

WORKERS = 4
Start = Callable[..., Any]


def worker_pids(supervisor: int) -> set[int]:
    """Its children that are workers; multiprocessing has a child of its own beside them."""
    tasks = Path(f"/proc/{supervisor}/task").iterdir()
    children = {int(child) for task in tasks for child in (task / "children").read_text().split()}
    return {child for child in children if b"spawn_main" in _command_line(child)}


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # it has just gone
        return b""


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[valkey_servers.Server]:
    with valkey_servers.server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="workers are found in Linux's /proc")
def test_workers_on_one_file_count_every_batch_once_whatever_is_killed(start: Start, store: str) -> None:
    service = start("--store", store, "--workers", str(WORKERS))
    supervisor = service.process.pid
    rng = random.Random(5)

    def kill() -> None:
        if pids := sorted(worker_pids(supervisor)):
            os.kill(rng.choice(pids), signal.SIGKILL)

    first = worker_pids(supervisor)
    assert len(first) == WORKERS
    traffic = Traffic([service.url], kill, KILLS)
    traffic.check(traffic.run())
    wait_for("killed workers come back", lambda: len(worker_pids(supervisor)) == WORKERS)
    assert worker_pids(supervisor) != first
    assert service.stop() == 0
    assert not worker_pids_left(first)
    assert "Traceback" not in service.output


@pytest.mark.timeout(120)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="workers are found in Linux's /proc")
def test_a_commit_in_one_worker_ends_the_waits_in_all(start: Start, store: str, http: httpx.Client) -> None:
    service = start("--store", store, "--workers", "2")
    workers = worker_pids(service.process.pid)
    layer = f"{service.url}/v1/layers/a"
    http.put(layer, json={"num_features": 2}).raise_for_status()
    tag = http.get(f"{layer}/state").headers["etag"]
    address = ("127.0.0.1", int(service.url.rpartition(":")[2]))
    waiting: dict[socket.socket, int] = {}
    with contextlib.ExitStack() as stack:
        while set(waiting.values()) != workers:  # the kernel chooses the worker of a connection
            one = stack.enter_context(socket.create_connection(address, timeout=50))
            one.sendall(f"GET /v1/layers/a/state?wait=60 HTTP/1.1\r\nHost: a\r\nIf-None-Match: {tag}\r\n\r\n".encode())
            wait_for("the call waits", lambda: _waiting_calls(http, service.url) == len(waiting) + 1)
            waiting[one] = worker_of(one, workers)
        http.post(f"{layer}/train", json={"input": [[1, 2], [3, 6]]}).raise_for_status()
        new = http.get(f"{layer}/state").headers["etag"]
        assert new != tag
        for one in waiting:
            head = one.recv(1 << 16).decode("latin-1").lower()
            assert head.startswith("http/1.1 200 ")
            assert f"etag: {new}\r\n" in head
    assert service.stop() == 0


def _waiting_calls(http: httpx.Client, url: str) -> float:
    lines = http.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("batchnorm_waiting_calls "))


def worker_of(connection: socket.socket, workers: set[int]) -> int:
    """The worker at the other end of a connection on this machine, by the inode of its socket."""
    here, there = connection.getsockname()[1], connection.getpeername()[1]
    ends = f":{there:04X}", f":{here:04X}"
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    (inode,) = [fields[9] for fields in lines if (fields[1][8:], fields[2][8:]) == ends]
    (worker,) = [pid for pid in workers if f"socket:[{inode}]" in _open_files(pid)]
    return worker


def _open_files(process: int) -> set[str]:
    found = set()
    for file in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(file))
    return found


@pytest.mark.timeout(120)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="workers are found in Linux's /proc")
def test_workers_stop_when_their_supervisor_is_killed(start: Start, store: str) -> None:
    port = str(free_port())
    service = start("--store", store, "--workers", "2", "--port", port)
    workers = worker_pids(service.process.pid)
    assert len(workers) == 2
    service.stop(signal.SIGKILL)
    wait_for("the workers stop", lambda: not worker_pids_left(workers))
    assert "Traceback" not in service.output
    assert start("--store", store, "--port", port).stop() == 0  # it can lock the file and listen


def worker_pids_left(pids: set[int]) -> set[int]:
    return {pid for pid in pids if b"spawn_main" in _command_line(pid)}


@pytest.mark.timeout(300)
def test_replicas_on_one_valkey_count_every_batch_once_whatever_is_killed(
    start: Start, valkey: valkey_servers.Server
) -> None:
    arguments = [("--store", valkey.url, "--port", str(free_port())) for _ in range(3)]
    replicas = [start(*each) for each in arguments]
    rng = random.Random(7)

    def kill() -> None:
        number = rng.randrange(len(replicas))
        replicas[number].close()
        replicas[number] = start(*arguments[number])

    traffic = Traffic([replica.url for replica in replicas], kill, KILLS)
    traffic.check(traffic.run())
    assert [replica.stop() for replica in replicas] == [0, 0, 0]
