"""Several worker processes on one port, under uvicorn's own supervisor: one that dies comes back by itself."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from batchnorm_service.api import Shell
from batchnorm_service.app import create_app, make_store
from batchnorm_service.memory import settle_memory
from batchnorm_service.server import Announce, address, configure_logging, listen, uvicorn_config
from batchnorm_service.settings import Settings

_log = logging.getLogger(__name__)
_GLANCE_SECONDS = 0.05  # how long the supervisor waits for a worker that may not listen yet


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
        url = address(settings, listener)
        supervisor = Supervisor(config, [listener], lambda: announce(url, settings, store.url))
        supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise WorkersFailedError("the workers did not start; their log says why")


class Supervisor(Multiprocess):
    """Uvicorn's supervisor, which says when all workers listen, and gives them the time that importing torch takes.

    Uvicorn's own replaces a worker that does not answer within seconds, and ends the service when one fails to start.
    Here one that starts is left alone as long as its process lives, and the service goes on without one that cannot
    start (its store may be away for a moment) once all have started.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], started: Callable[[], None]) -> None:
        super().__init__(config, sockets)
        self._started = started
        self._told = False
        self._ready: set[Process] = set()

    def keep_subprocess_alive(self) -> None:
        """Called twice a second: replace workers that died or hang, and say once when all of them listen."""
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if not self._lives(worker):
                self._replace(index, worker)
        if not self._told and self._ready.issuperset(self.processes):
            self._told = True
            self._started()

    def _lives(self, worker: Process) -> bool:
        if not worker.process.is_alive():
            return False
        if worker in self._ready:
            return worker.ping(self.config.timeout_worker_healthcheck)
        if worker.is_ready(_GLANCE_SECONDS):
            self._ready.add(worker)
        return True

    def _replace(self, index: int, worker: Process) -> None:
        worker.kill()
        worker.join()
        self._ready.discard(worker)
        if worker.exitcode == STARTUP_FAILURE and not self._told:
            self.should_exit.set()
            return
        _log.warning("worker %s ended with status %s; another starts", worker.pid, worker.exitcode)
        self.processes[index] = Process(self.config, self.sockets)
        self.processes[index].start()


def worker() -> Shell:
    """The application of one worker."""
    settings = Settings()
    configure_logging(settings)
    shell = create_app(settings)
    settle_memory()
    return shell
