"""Several worker processes on one port, under uvicorn's own supervisor: one that dies comes back by itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from batchnorm_service.api import Shell
from batchnorm_service.app import create_app, make_store
from batchnorm_service.server import Announce, address, configure_logging, listen, uvicorn_config
from batchnorm_service.settings import Settings

_START_SECONDS = 120


class WorkersFailedError(Exception):
    """The workers could not start."""


def run_workers(settings: Settings, announce: Announce) -> None:
    """Serve with `settings.workers` processes until SIGTERM or SIGINT; return when all of them have stopped.

    The workers read their settings from the environment. They commit by compare-and-set to one store, and each looks
    there before it answers, so a caller sees every acknowledged fold whichever worker it reaches.

    Raises:
        PortUnavailableError: the address cannot be listened on.
        StoreRefusedError: the store cannot be opened, or not by several processes.
        WorkersFailedError: they do not start, for a reason that is in their log.
    """
    configure_logging(settings)
    store = make_store(settings)

    async def try_store() -> None:
        await store.open()
        await store.close()

    asyncio.run(try_store())
    with listen(settings.host, settings.port) as listener:
        config = uvicorn_config(
            settings, "batchnorm_service.workers:worker", factory=True, lifespan="on", workers=settings.workers
        )
        # uvicorn kills a worker that does not answer in time; on a busy machine importing torch alone takes longer than
        # the few seconds that are its default.
        config.timeout_worker_healthcheck = _START_SECONDS
        url = address(settings, listener)
        supervisor = Supervisor(config, [listener], lambda: announce(url, settings, store.url))
        supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise WorkersFailedError("the workers did not start; their log says why")


class Supervisor(Multiprocess):
    """Uvicorn's supervisor, which says when all workers listen."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], started: Callable[[], None]) -> None:
        super().__init__(config, sockets)
        self._started = started
        self._told = False

    def keep_subprocess_alive(self) -> None:
        """Called again and again: replace workers that died, and say once when all of them listen."""
        super().keep_subprocess_alive()
        if not self._told and all(worker.is_ready(timeout=_START_SECONDS) for worker in self.processes):
            self._told = True
            self._started()


def worker() -> Shell:
    """The application of one worker."""
    settings = Settings()
    configure_logging(settings)
    return create_app(settings)
