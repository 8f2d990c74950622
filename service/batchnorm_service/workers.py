"""Runs several worker processes on one port, under uvicorn's supervisor, which restarts workers that die."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing.process
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from batchnorm_service.app import create_app, make_store, make_traces, open_token_file
from batchnorm_service.memory import settle_memory
from batchnorm_service.rest import Gateway
from batchnorm_service.server import Announce, address, check_certificate, listen, set_up_logging, uvicorn_config
from batchnorm_service.settings import Settings
from batchnorm_service.store.base import Store, StoreError, StoreLostError
from batchnorm_service.store.sqlite.identity import FileIds
from batchnorm_service.store.sqlite.store import SqliteStore

_log = logging.getLogger(__name__)
_READY_POLL_SECONDS = 0.05  # how long the supervisor waits for a starting worker to report that it listens


class WorkersFailedError(Exception):
    """The workers could not start."""


def run_workers(settings: Settings, announce: Announce) -> None:
    """Serve with `settings.workers` processes until SIGTERM or SIGINT; return when all of them have stopped.

    The workers read their settings from the environment. They commit to one store by compare-and-set, and check it
    before using cached states, so callers see all acknowledged updates through any worker. This process keeps an SQLite
    file open until the end, so that workers which start later can check that they open the same file.

    Raises:
        PortUnavailableError: the service cannot listen on the address.
        CertificateError: the certificate or its key cannot be used.
        StoreRefusedError: the store cannot be opened, or not by several processes.
        TokenFileError: the token file cannot be read or made, or is damaged.
        TracesRefusedError: traces cannot be exported.
        WorkersFailedError: the workers do not start (see their log), or all have ended after the store was lost.
    """
    set_up_logging(settings)
    check_certificate(settings)
    if (traces := make_traces(settings)) is not None:  # here, so that the error is reported once
        traces.close()
    if settings.tokens_file is not None:
        open_token_file(settings.tokens_file)  # here, so that its first token is printed by one process only
    store = make_store(settings)
    with asyncio.Runner() as runner:
        runner.run(store.open())
        try:
            if not isinstance(store, SqliteStore):
                runner.run(store.close())
            with tempfile.TemporaryDirectory(prefix="batchnorm-metrics-") as directory:
                _supervise(settings, store, announce, Path(directory))
        finally:
            runner.run(store.close())


def _supervise(settings: Settings, store: Store, announce: Announce, metrics_directory: Path) -> None:
    files = store.files.ids if isinstance(store, SqliteStore) else ()
    with listen(settings.host, settings.port) as listener:
        app = partial(worker, files, metrics_directory)
        config = uvicorn_config(settings, app, factory=True, lifespan="on", workers=settings.workers)
        url = address(settings, listener)
        supervisor = Supervisor(
            config, [listener], lambda: announce(url, settings, store.url), partial(_is_lost, store)
        )
        supervisor.run()
    if supervisor.failed:
        raise WorkersFailedError(supervisor.failed)


def _is_lost(store: Store) -> bool:
    """Whether a new worker would open another SQLite file than the running workers."""
    if isinstance(store, SqliteStore):
        store.files.force_check()
        try:
            store.files.verify()
        except StoreLostError:
            return True
        except StoreError:  # unknown: the worker itself checks when it opens the file
            return False
    return False


class Supervisor(Multiprocess):
    """uvicorn supervisor that reports when all workers listen, and allows for the time of importing torch.

    uvicorn's supervisor replaces a worker that does not respond within seconds, and ends the service if one fails to
    start. This one waits for a starting worker as long as its process runs. Once all workers have started, it retries
    when one cannot start, as its store may be unavailable for a moment.

    Args:
        config: uvicorn's configuration of every worker.
        sockets: the sockets to listen on.
        started: called when all workers listen.
        lost: whether the store was lost. Then no worker is started any more: the remaining ones respond 503 until an
            operator stops the service, and when none is left the service ends.

    Attributes:
        failed: why the service ended by itself; empty if it was stopped.
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
        self._is_lost = lost
        self._announced = False
        self._ready: set[Process] = set()

    def keep_subprocess_alive(self) -> None:
        """Called twice a second: replace workers that died or hang, and call `started` once all of them listen."""
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if not self._is_running(worker):
                self._kill(worker)
                self._replace(index, worker)
        if not self._announced and self._ready.issuperset(self.processes):
            self._announced = True
            self._started()

    def _is_running(self, worker: Process) -> bool:
        if not worker.process.is_alive():
            return False
        if worker in self._ready:
            return worker.ping(self.config.timeout_worker_healthcheck)
        if worker.is_ready(_READY_POLL_SECONDS):
            self._ready.add(worker)
        return True

    def _kill(self, worker: Process) -> None:
        worker.kill()
        worker.join()
        self._ready.discard(worker)

    def _replace(self, index: int, worker: Process) -> None:
        if worker.exitcode == STARTUP_FAILURE and not self._announced:
            self._fail("the workers did not start; their log says why")
            return
        if self._is_lost():
            if not any(each.process.is_alive() for each in self.processes):
                self._fail("the SQLite file was deleted, moved or replaced, and no worker that had it open is left")
            return
        _log.warning("worker %s ended with status %s; another starts", worker.pid, worker.exitcode)
        self.processes[index] = Process(self.config, self.sockets)
        self.processes[index].start()

    def _fail(self, reason: str) -> None:
        self.failed = reason
        self.should_exit.set()


def _stop_with_supervisor() -> None:
    """Stop as on SIGTERM when the supervisor is killed: nobody would stop workers left alone, which keep the port."""

    def wait(supervisor: multiprocessing.process.BaseProcess) -> None:
        supervisor.join()
        os.kill(os.getpid(), signal.SIGTERM)

    if (supervisor := multiprocessing.parent_process()) is not None:
        threading.Thread(target=wait, args=(supervisor,), name="supervisor", daemon=True).start()


def worker(files: FileIds, metrics_directory: Path) -> Gateway:
    """Create the application of one worker; an SQLite store must have these files."""
    _stop_with_supervisor()
    settings = Settings()
    set_up_logging(settings)
    store = make_store(settings)
    if isinstance(store, SqliteStore):
        store.files.expected = files
    gateway = create_app(settings, store, metrics_directory)
    settle_memory()
    return gateway
