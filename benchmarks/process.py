"""Servers as processes of their own, on the server's core and a free port."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cores import server_core

ROOT = Path(__file__).parent.parent
_START_SECONDS = 90.0
_STOP_SECONDS = 15.0


class Server:
    """A server that answers on `port`.

    Args:
        command: what to run, with "{port}" where its port goes.
        path: is asked with GET until it answers 200.
        variables: environment variables beside this process's own, of which settings of the service are left out.

    Attributes:
        port: where it listens.
        process: its first process.
        seconds: from its start to its first answer.
    """

    def __init__(self, command: Sequence[str], path: str = "/", **variables: str) -> None:
        self.port = _free_port()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BATCHNORM_")}
        # One core is one thread of arithmetic, for every server alike.
        kept |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        kept |= variables
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        begin = time.perf_counter()
        with server_core():
            self.process = subprocess.Popen(
                [part.replace("{port}", str(self.port)) for part in command],
                env=kept,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # some peers start processes of their own: all of them are to end
            )
        try:
            self._wait(path, begin + _START_SECONDS)
        except BaseException:
            self.stop()
            raise
        self.seconds = time.perf_counter() - begin

    def memory(self, field: str) -> int:
        """`VmRSS` (now) or `VmHWM` (the most since `forget_peak`) of /proc, in bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise LookupError(field)

    def used(self, *, main_thread: bool = False) -> float:
        """Seconds of processor time that its first process has had so far, or that process's main thread alone."""
        process = self.process.pid
        stat = Path(f"/proc/{process}/task/{process}/stat" if main_thread else f"/proc/{process}/stat")
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system

    def forget_peak(self) -> None:
        """Let `VmHWM` start again from what is used now."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def stop(self) -> None:
        """End it and whatever it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS)
        self._log.close()

    def _wait(self, path: str, deadline: float) -> None:
        while not self._answers(path):
            if self.process.poll() is not None or time.perf_counter() > deadline:
                self._log.seek(0)
                said = self._log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"{self.process.args!r} did not get ready: {said}")
            time.sleep(0.01)

    def _answers(self, path: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def service(store: str, **variables: str) -> Server:
    """Our own, over that store."""
    command = [sys.executable, "-m", "batchnorm_service", "serve", "--port", "{port}", "--store", store]
    return Server(command, "/readyz", **{"BATCHNORM_LOG_LEVEL": "warning", **variables})


def opponent(name: str) -> Server:
    """One of `benchmarks.servers`."""
    path = "/" if name in {"echo", "collector"} else "/openapi.json"
    return Server([sys.executable, "-m", f"benchmarks.servers.{name}", "{port}"], path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
