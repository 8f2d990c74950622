"""The service with faults at points that a test names: see `programs/faulty_service.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx

from store.valkey_servers import free_port, wait_for

from .conftest import Process

PROGRAM = Path(__file__).parent / "programs" / "faulty_service.py"


class FaultyService:
    """A service that is started again when it was killed.

    Args:
        directory: for its file, and for what the test asks for.
        store: the URL of its store.
        variables: of its environment.

    Attributes:
        url: its address.
        process: what runs it.
    """

    def __init__(self, directory: Path, store: str, **variables: str) -> None:
        self._directory = directory
        command = [sys.executable, str(PROGRAM), str(directory), "serve"]
        self.process = Process("--store", store, "--port", str(free_port()), command=command, **variables)
        self.url = self.process.url
        assert self.url, self.process.output

    def kill_at(self, point: int | str) -> None:
        """Kill it at that point, once."""
        (self._directory / "died").unlink(missing_ok=True)
        (self._directory / "kill").write_text(str(point))

    def died_at(self) -> str:
        """What it was about to do when it was killed, after it is there again; empty if it was not killed."""
        died = self._directory / "died"
        if not died.exists():
            (self._directory / "kill").unlink()
            return ""
        self.wait()
        return died.read_text()

    def wait(self) -> None:
        """Until it is ready."""
        wait_for("the service is there again", self._ready)

    def set_clock(self, seconds: float) -> None:
        """Let the wall clock be wrong by that much."""
        (self._directory / "clock").write_text(str(seconds))

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False
