"""Several worker processes on one port, under uvicorn's own supervisor: one that dies comes back by itself."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from batchnorm_service.app import create_app, make_store
from batchnorm_service.memory import settle_memory
from batchnorm_service.rest import Gateway
from batchnorm_service.server import Announce, address, configure_logging, listen, uvicorn_config
from batchnorm_service.settings import Settings
from batchnorm_service.store.base import Store, StoreError, StoreLostError
from batchnorm_service.store.sqlite.identity import FileIds
from batchnorm_service.store.sqlite.store import SqliteStore

_log = logging.getLogger(__name__)
_GLANCE_SECONDS = 0.05  # how long the supervisor waits for a worker that may not listen yet


class WorkersFailedError(Exception):
    """The workers could not start."""


def run_workers(settings: Settings, announce: Announce) -> None:
    """Serve with `settings.workers` processes until SIGTERM or SIGINT; return when all of them have stopped.

    The workers read their settings from the environment. They commit by compare-and-set to one store, and each looks
    there before it answers, so a caller sees every acknowledged fold whichever worker it reaches. An SQLite file stays
    open here until the end, so that a worker which starts later can tell it from another file of that name.

    Raises:
        PortUnavailableError: the address cannot be listened on.
        StoreRefusedError: the store cannot be opened, or not by several processes.
        WorkersFailedError: they do not start, for a reason that is in their log, or all ended after the store was lost.
    """
    configure_logging(settings)
    store = make_store(settings)
    with asyncio.Runner() as runner:
        runner.run(store.open())
        try:
            if not isinstance(store, SqliteStore):
                runner.run(store.close())
            _supervise(settings, store, announce)
        finally:
            runner.run(store.close())


def _supervise(settings: Settings, store: Store, announce: Announce) -> None:
    files = store.files.ids if isinstance(store, SqliteStore) else ()
    with listen(settings.host, settings.port) as listener:
        config = uvicorn_config(settings, partial(worker, files), factory=True, lifespan="on", workers=settings.workers)
        url = address(settings, listener)
        supervisor = Supervisor(config, [listener], lambda: announce(url, settings, store.url), partial(_lost, store))
        supervisor.run()
    if supervisor.failed:
        raise WorkersFailedError(supervisor.failed)


def _lost(store: Store) -> bool:
    """Whether a worker that starts now would find another file than the others have."""
    if isinstance(store, SqliteStore):
        store.files.force_check()
        try:
            store.files.verify()
        except StoreLostError:
            return True
        except StoreError:  # cannot be told: the worker finds out
            return False
    return False


class Supervisor(Multiprocess):
    """Uvicorn's supervisor, which says when all workers listen, and gives them the time that importing torch takes.

    Uvicorn's own replaces a worker that does not answer within seconds, and ends the service when one fails to start.
    Here one that starts is left alone as long as its process lives, and the service goes on without one that cannot
    start (its store may be away for a moment) once all have started.

    Args:
        config: of every worker.
        sockets: that they listen on.
        started: called when all of them listen.
        lost: whether the store was lost. Then none is started any more: those that are left answer 503 until somebody
            has seen to it and stops the service, and when none is left the service ends.

    Attributes:
        failed: why it ended by itself; empty when it was told to.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        sockets: list[socket.socket],
        started: Callable[[], None],
        lost: Callable[[], bool],
    ) -> None:
        super().__init__(config, sockets)
        self.failed = ""
        self._started = started
        self._lost = lost
        self._told = False
        self._ready: set[Process] = set()

    def keep_subprocess_alive(self) -> None:
        """Called twice a second: replace workers that died or hang, and say once when all of them listen."""
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if not self._lives(worker):
                self._end(worker)
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

    def _end(self, worker: Process) -> None:
        worker.kill()
        worker.join()
        self._ready.discard(worker)

    def _replace(self, index: int, worker: Process) -> None:
        if worker.exitcode == STARTUP_FAILURE and not self._told:
            self._fail("the workers did not start; their log says why")
            return
        if self._lost():
            if not any(each.process.is_alive() for each in self.processes):
                self._fail("the SQLite file was deleted, moved or replaced, and no worker that had it open is left")
            return
        _log.warning("worker %s ended with status %s; another starts", worker.pid, worker.exitcode)
        self.processes[index] = Process(self.config, self.sockets)
        self.processes[index].start()

    def _fail(self, reason: str) -> None:
        self.failed = reason
        self.should_exit.set()


def worker(files: FileIds) -> Gateway:
    """The application of one worker, on those files of an SQLite store and no others."""
    settings = Settings()
    configure_logging(settings)
    store = make_store(settings)
    if isinstance(store, SqliteStore):
        store.files.expected = files
    gateway = create_app(settings, store)
    settle_memory()
    return gateway
