"""What the rows share: how long to measure, and servers that are started once, when the first row asks."""

from __future__ import annotations

import contextlib
import http.client
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.load import Call, drive
from benchmarks.process import Server, opponent, service


@dataclass(frozen=True)
class Pace:
    """How thoroughly to measure.

    Attributes:
        rounds: of each ratio.
        seconds: that each side of a round takes.
        warm: seconds before the first round.
        cold_layers: in the store of the row that starts over a large one.
        in_flight: requests at once in the row about memory.
        peers: whether other servers are installed and compared.
    """

    rounds: int
    seconds: float
    warm: float
    cold_layers: int
    in_flight: int
    peers: bool


FULL = Pace(rounds=7, seconds=2.0, warm=1.0, cold_layers=100_000, in_flight=8, peers=True)
QUICK = Pace(rounds=3, seconds=0.8, warm=0.4, cold_layers=100_000, in_flight=8, peers=False)
SMOKE = Pace(rounds=1, seconds=0.05, warm=0.0, cold_layers=10, in_flight=2, peers=False)


class Bench:
    """A context manager: at its end every server is stopped and every file removed."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._stack = contextlib.ExitStack()
        self._servers: dict[str, Server] = {}
        self._layers: set[tuple[int, str]] = set()

    def __enter__(self) -> Self:
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="batchnorm-bench-")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def service(self) -> Server:
        """The service over a durable SQLite file."""
        if "service" not in self._servers:
            self._servers["service"] = self.own_service("shared")
        return self._servers["service"]

    def opponent(self, name: str) -> Server:
        """One of `benchmarks.servers`."""
        if name not in self._servers:
            self._servers[name] = self.running(opponent(name))
        return self._servers[name]

    def own_service(self, file: str, **variables: str) -> Server:
        """Another service, over a file of its own."""
        return self.running(service(f"sqlite:///{self.directory}/{file}.db", **variables))

    def running(self, server: Server) -> Server:
        """The server, which is stopped at the end."""
        self._stack.callback(server.stop)
        return server

    def layer(self, name: str, num_features: int = 64, server: Server | None = None, **config: str) -> str:
        """The name of a layer that exists."""
        server = server or self.service
        if (server.port, name) not in self._layers:
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            body = json.dumps({"num_features": num_features, **config})
            connection.request("PUT", f"/v1/layers/{name}", body, {"Content-Type": "application/json"})
            status = connection.getresponse().status
            connection.close()
            if status not in (200, 201):
                raise RuntimeError(f"PUT of layer {name} gave {status}")
            self._layers.add((server.port, name))
        return name

    def rate(self, call: Call) -> float:
        """Answers per second, for as long as a side takes."""
        return drive(call, self.pace.seconds).rate

    def warm(self, *calls: Call) -> None:
        """What comes before the first round: caches, threads and memory as they will be."""
        for call in calls:
            drive(call, self.pace.warm)
