"""The peers: what each one is, and an environment for it."""

from __future__ import annotations

import base64
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import request
from benchmarks.process import ROOT, Server

_INSTALL_SECONDS = 600


@dataclass(frozen=True)
class Peer:
    """Another server.

    Attributes:
        name: as in .venv-bench-<name>.
        requirement: what pip installs; none of them needs torch.
        command: the server, after the environment's bin directory.
        ready: is asked with GET until it answers 200.
        path: takes the batch.
        body: the batch as JSON, with "{data}" where its base64 goes; the batch itself when None.
    """

    name: str
    requirement: str
    command: tuple[str, ...]
    ready: str
    path: str
    body: str | None

    @property
    def _bin(self) -> Path:
        return ROOT / f".venv-bench-{self.name}" / "bin"

    def install(self) -> str | None:
        """Set up its environment, once. What went wrong in a word, or None."""
        stamp = self._bin.parent / "installed"
        if stamp.exists() and stamp.read_text() == self.requirement:
            return None
        print(f"Setting up {self._bin.parent.name} (once) ...", file=sys.stderr, flush=True)
        pip = [self._bin / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        try:
            subprocess.run([sys.executable, "-m", "venv", self._bin.parent], check=True, capture_output=True)
            subprocess.run(
                [*pip, self.requirement, "numpy"], check=True, capture_output=True, text=True, timeout=_INSTALL_SECONDS
            )
        except subprocess.CalledProcessError as error:
            said = [line for line in str(error.stderr).splitlines() if line.startswith("ERROR")]
            return said[-1][:200] if said else "pip failed"
        except subprocess.TimeoutExpired:
            return f"pip took longer than {_INSTALL_SECONDS} s"
        stamp.write_text(self.requirement)
        return None

    def start(self) -> Server:
        """The server."""
        return Server([str(self._bin / self.command[0]), *self.command[1:]], self.ready, **_QUIET)

    def request(self, batch: bytes) -> bytes:
        """A call with that batch."""
        if self.body is None:
            return request(self.path, batch, "application/octet-stream")
        body = self.body.replace("{data}", base64.b64encode(batch).decode())
        return request(self.path, body.encode(), "application/json")


_QUIET = {"BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0", "LITSERVE_DISABLE_ANALYTICS": "1"}
_V2 = (
    '{"inputs":[{"name":"input","datatype":"BYTES","shape":[1,1],"parameters":{"content_type":"base64"},'
    '"data":["{data}"]}]}'
)


def _module(name: str) -> tuple[str, ...]:
    return ("python", "-m", f"benchmarks.peers.{name}_server", "{port}")


PEERS = (
    Peer("litserve", "litserve==0.2.19", _module("litserve"), "/health", "/predict", '{"data":"{data}"}'),
    Peer("mlserver", "mlserver==1.7.1", _module("mlserver"), "/v2/models/bn/ready", "/v2/models/bn/infer", _V2),
    Peer(
        "bentoml",
        "bentoml==1.4.39",
        ("bentoml", "serve", "benchmarks.peers.bentoml_server:BatchNorm", "--host", "127.0.0.1", "--port", "{port}"),
        "/readyz",
        "/eval",
        '{"data":"{data}"}',
    ),
    Peer("ray", "ray[serve]==2.60.0", _module("ray"), "/", "/", None),
)
