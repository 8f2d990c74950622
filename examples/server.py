"""Starts a service for an example."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from batchnorm_client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def server(store: str = "memory:") -> Iterator[str]:
    """A service on a free port of this machine. It is stopped at the end, and must exit with status 0.

    Args:
        store: as the setting BATCHNORM_STORE.

    Yields:
        Its address.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "batchnorm_service", "serve", "--port", str(port), "--store", store]
    process = subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        with Client(address) as client:
            while not client.ready():
                if process.poll() is not None:
                    raise SystemExit(f"the server stopped with status {process.returncode}")
                time.sleep(0.05)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    if status != 0:
        raise SystemExit(f"the server should stop with status 0, not {status}")
