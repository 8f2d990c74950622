"""How fast a commit reaches every follower of a layer: `python -m benchmarks.followers [FOLLOWERS] [COMMITS]`.

The followers are sockets in one epoll loop of this process, each with a call that waits for another state; the service
runs on the other core. Time counts from the response to the commit's call until the last follower has the whole
response. The response to a commit may come after those to the followers, who then count with zero.
"""

from __future__ import annotations

import select
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Final

import httpx
import numpy as np

from benchmarks.cores import use_load_core
from benchmarks.process import service

CHANNELS: Final = 64
_PATH: Final = "/v1/state?names=obs"
_PATIENCE: Final = 30.0


class _Follower:
    """A connection with a request that waits; asks again as soon as it has a response."""

    def __init__(self, port: int, etag: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.etag = etag
        self.sent = 0
        self._buffer = b""

    def ask(self) -> None:
        head = f"GET {_PATH}&wait=60 HTTP/1.1\r\nHost: b\r\nIf-None-Match: {self.etag}\r\n\r\n".encode()
        self.sent += len(head)
        self.socket.sendall(head)

    def receive(self) -> int:
        """Bytes of a response that is complete now; else 0."""
        self._buffer += self.socket.recv(1 << 16)
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return 0
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        if len(body) < int(headers["content-length"]):
            return 0
        if not lines[0].startswith("HTTP/1.1 200"):
            raise RuntimeError(lines[0])
        size, self._buffer, self.etag = len(self._buffer), b"", headers["etag"]
        return size


@dataclass
class Measured:
    """What was measured.

    Attributes:
        last: seconds from each commit to the last follower's response.
        requests: of all followers.
        received, sent: bytes of all followers.
        seconds: that all commits took.
    """

    last: list[float] = field(default_factory=list)
    requests: int = 0
    received: int = 0
    sent: int = 0
    seconds: float = 0.0


def measure(port: int, followers: int, commits: int, pause: float) -> Measured:
    """Commit to the layer so often, with a pause after each, while so many follow it."""
    base = f"http://127.0.0.1:{port}"
    measured = Measured()
    rng = np.random.default_rng(0)
    with httpx.Client(base_url=base, timeout=60) as http:
        http.put("/v1/layers/obs", json={"num_features": CHANNELS, "affine": False}).raise_for_status()
        etag = http.get(_PATH).raise_for_status().headers["etag"]
        crowd = [_Follower(port, etag) for _ in range(followers)]
        poll = select.epoll()
        by_number = {one.socket.fileno(): one for one in crowd}
        for number, one in by_number.items():
            poll.register(number, select.EPOLLIN)
            one.ask()
        _until_all_wait(http, followers)
        begin = time.perf_counter()
        for _ in range(commits):
            moments = {"count": 8, "mean": rng.normal(size=CHANNELS).tolist(), "var": [1.0] * CHANNELS}
            http.post("/v1/layers/obs/moments", json=moments).raise_for_status()
            committed = time.perf_counter()
            waiting, end = set(by_number), committed + _PATIENCE
            while waiting:
                if time.perf_counter() > end:
                    raise RuntimeError(f"{len(waiting)} followers have no response")
                for number, _ in poll.poll(1.0):
                    if size := by_number[number].receive():
                        waiting.discard(number)
                        measured.received += size
                        measured.requests += 1
                        by_number[number].ask()
            measured.last.append(time.perf_counter() - committed)
            time.sleep(pause)
        measured.seconds = time.perf_counter() - begin
        measured.sent = sum(one.sent for one in crowd)
        poll.close()
        for one in crowd:
            one.socket.close()
    return measured


def _until_all_wait(http: httpx.Client, followers: int) -> None:
    end = time.perf_counter() + _PATIENCE
    while (waiting := _waiting(http)) < followers:
        if time.perf_counter() > end:
            raise RuntimeError(f"only {waiting:g} of {followers} followers wait")
        time.sleep(0.05)


def _waiting(http: httpx.Client) -> float:
    lines = http.get("/metrics").raise_for_status().text.splitlines()
    return float(next(line for line in lines if line.startswith("batchnorm_waiting_calls ")).split()[1])


def main() -> None:
    """Measure and print."""
    followers = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    commits = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    pause = 0.1 if commits > 10 else 0.0
    with tempfile.TemporaryDirectory() as folder:
        server = service(f"sqlite:///{folder}/layers.db")
        try:
            use_load_core()
            found = measure(server.port, followers, commits, pause)
        finally:
            server.stop()
    milliseconds = np.percentile(found.last, (50, 99)) * 1e3
    each = followers * found.seconds
    print(f"{followers} followers, {commits} commits, {commits / found.seconds:.1f} commits per second")
    print(f"commit to the last response: p50 {milliseconds[0]:.1f} ms, p99 {milliseconds[1]:.1f} ms")
    print(
        f"per follower and second: {found.requests / each:.2f} requests, {found.received / each:,.0f} bytes in,"
        f" {found.sent / each:,.0f} bytes out"
    )


if __name__ == "__main__":
    main()
