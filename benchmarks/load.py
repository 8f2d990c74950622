"""The load: connections that send a request, wait for its whole answer, and send the next.

Python on purpose: it installs with nothing else. A request costs it two system calls and a few microseconds, about a
fifth of what the fastest server here needs for one, so it keeps that server busy with time to spare.
"""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import re
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event

_BLOCK = 1 << 18
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_PATIENCE = 60.0
_LONGEST = 600.0


@dataclass(frozen=True)
class Call:
    """What to send.

    Attributes:
        port: of the server, on this machine.
        requests: whole HTTP requests, sent in turn; or a function that makes one after the other, each for one use.
        connections: how many are in flight at once.
        refusals: whether an answer may be 503; otherwise each must be 200.
    """

    port: int
    requests: Sequence[bytes] | Callable[[], Iterator[bytes]]
    connections: int = 8
    refusals: bool = False


@dataclass(frozen=True)
class Measured:
    """What came of it.

    Attributes:
        rate: answers per second.
        latencies: seconds of each request, sorted.
        refused: how many of them were answered with 503.
    """

    rate: float
    latencies: list[float]
    refused: int = 0

    def percentile(self, percent: float) -> float:
        """The latency that so many percent of the requests did not exceed, in seconds."""
        return self.latencies[min(len(self.latencies) - 1, int(len(self.latencies) * percent / 100))]


def request(path: str, body: bytes, content_type: str, *, method: str = "POST", headers: str = "") -> bytes:
    """An HTTP/1.1 request as bytes."""
    head = f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def drive(call: Call, seconds: float, most: float = math.inf) -> Measured:
    """Keep `call.connections` requests in flight for so long, or until so many were answered."""
    return _drive(call, seconds, lambda count: count >= most)


def _drive(call: Call, seconds: float, done: Callable[[int], bool]) -> Measured:
    latencies: list[float] = []
    refused = 0
    turns = call.requests() if callable(call.requests) else itertools.cycle(call.requests)
    with selectors.DefaultSelector() as selector:
        connections = [_Connection(call, selector) for _ in range(call.connections)]
        gc.disable()
        try:
            begin = time.perf_counter()
            end = begin + seconds
            for connection in connections:
                connection.send(next(turns))
            # At least one answer, however short the time.
            while ((now := time.perf_counter()) < end or not latencies) and not done(len(latencies)):
                events = selector.select(_PATIENCE)
                if not events:
                    raise TimeoutError(f"no answer on port {call.port} for {_PATIENCE:.0f} s")
                for key, mask in events:
                    connection = key.data
                    if mask & selectors.EVENT_WRITE:
                        connection.flush()
                    if mask & selectors.EVENT_READ and connection.receive():
                        latencies.append(time.perf_counter() - connection.since)
                        refused += connection.refused
                        connection.send(next(turns))
            _drain(selector, connections)
        finally:
            gc.enable()
            for connection in connections:
                connection.socket.close()
    return Measured(len(latencies) / (now - begin), sorted(latencies), refused)


def _drain(selector: selectors.BaseSelector, connections: Sequence[_Connection]) -> None:
    """Let what is under way be answered: a slow server would go on with it while the next one is measured."""
    busy = {connection for connection in connections if connection.busy}
    while busy:
        events = selector.select(_PATIENCE)
        if not events:
            raise TimeoutError(f"no answer for {_PATIENCE:.0f} s")
        for key, mask in events:
            if mask & selectors.EVENT_WRITE:
                key.data.flush()
            if mask & selectors.EVENT_READ and key.data.receive():
                busy.discard(key.data)


@contextmanager
def background(call: Call) -> Iterator[None]:
    """The same load from a process of its own, while the block runs."""
    context = multiprocessing.get_context("spawn")
    running, stop = context.Event(), context.Event()
    process = context.Process(target=_drive_until, args=(call, running, stop))
    process.start()
    try:
        if not running.wait(_PATIENCE):
            raise TimeoutError("the load in the background got no answer")
        yield
        if not process.is_alive():
            raise RuntimeError("the load in the background broke off")
    finally:
        stop.set()
        process.join(_PATIENCE)


def _drive_until(call: Call, running: Event, stop: Event) -> None:
    def done(count: int) -> bool:
        if count:
            running.set()
        return stop.is_set()

    _drive(call, _LONGEST, done)


class _Connection:
    """One connection, with at most one request under way."""

    def __init__(self, call: Call, selector: selectors.BaseSelector) -> None:
        self.socket = socket.create_connection(("127.0.0.1", call.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.since = 0.0
        self.refused = False
        self._refusals = call.refusals
        self._selector = selector
        self._writing = False
        self._unsent = memoryview(b"")
        self._missing = -1  # bytes of the answer that have not come; -1 before its headers are complete
        self._head = b""
        self._buffer = bytearray(_BLOCK)
        selector.register(self.socket, selectors.EVENT_READ, self)

    def send(self, data: bytes) -> None:
        self.since = time.perf_counter()
        self._missing, self._head = -1, b""
        self._unsent = memoryview(data)
        self.flush()
        if self._unsent:
            self._writing = True
            self._selector.modify(self.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self)

    @property
    def busy(self) -> bool:
        """Whether an answer, or a part of it, has yet to come."""
        return self._missing != 0

    def flush(self) -> None:
        """Send one block, so that a large request does not hold up the others for long."""
        try:
            self._unsent = self._unsent[self.socket.send(self._unsent[:_BLOCK]) :]
        except BlockingIOError:
            return
        if not self._unsent and self._writing:
            self._writing = False
            self._selector.modify(self.socket, selectors.EVENT_READ, self)

    def receive(self) -> bool:
        """Read what is there; True when that completes the answer."""
        try:
            count = self.socket.recv_into(self._buffer)
        except BlockingIOError:
            return False
        if count == 0:
            raise ConnectionError("the server closed the connection")
        if self._missing >= 0:
            self._missing -= count
            return self._missing == 0
        self._head += bytes(self._buffer[:count])
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return False
        length = _LENGTH.search(self._head, 0, end)
        self.refused = self._refusals and self._head.startswith(b"HTTP/1.1 503")
        if not (self.refused or self._head.startswith(b"HTTP/1.1 200")) or length is None:
            raise RuntimeError(f"expected 200 with a length, got {self._head[:500]!r}")
        self._missing = int(length[1]) - (len(self._head) - end - 4)
        return self._missing == 0
