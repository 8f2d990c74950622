"""`LocalService`: a real service in a thread of this process, on a free port of this machine."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import uvicorn

from batchnorm_client import AsyncClient, Client
from batchnorm_service.app import create_app
from batchnorm_service.server import Server, address, listen, serve, uvicorn_config
from batchnorm_service.settings import Settings

if TYPE_CHECKING:
    import os
    import socket

    from pydantic_settings import PydanticBaseSettingsSource


class _GivenSettings(Settings):
    """Settings without the environment's, which are meant for another service."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[Any], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class _ServerInThread(Server):
    """Leaves the process's memory settings and garbage collector alone, which are not the service's own here."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await uvicorn.Server.startup(self, sockets)
        self._started()


class LocalService:
    """A service in a thread of this process, on a free port of this machine.

        with LocalService() as client:
            layer = client.create_layer("obs", num_features=3)
            layer.train(batch)

    It is the real service: its HTTP interface, its checks, its store. It ends with the `with` block, or with `stop`.
    Variables of the environment are not its settings. torch's number of threads stays as it is, so that outputs are
    bit-equal to those of torch in this process.

    Args:
        path: of an SQLite file that keeps the layers; made if it does not exist; only one service may use it at a time.
            By default they are in memory, and gone with the service.
        settings: further settings of the service, by their names in `batchnorm_service.settings.Settings`.

    Raises:
        pydantic.ValidationError: a setting is not known or not valid.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        store = "memory:" if path is None else f"sqlite:///{Path(path).absolute()}"
        defaults = {"host": "127.0.0.1", "port": 0, "store": store, "threads": torch.get_num_threads()}
        self._settings = _GivenSettings(**{**defaults, **settings})
        self._thread: threading.Thread | None = None
        self._server: _ServerInThread
        self._client: Client | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """The service's address. Raises `RuntimeError` unless it runs."""
        if self._thread is None:
            raise RuntimeError("the service does not run; use `with LocalService() as client:`, or call start()")
        return self._url

    def start(self) -> Self:
        """Start the service; it answers when this returns.

        Raises:
            RuntimeError: it runs already.
            StoreRefusedError: the file cannot be used.
            PortUnavailableError: `port` or `host` was given, and the service cannot listen there.
        """
        if self._thread is not None:
            raise RuntimeError(f"the service runs already, at {self._url}")
        started: Future[str] = Future()
        thread = threading.Thread(target=self._run, args=(started,), name="batchnorm-service", daemon=True)
        thread.start()
        try:
            self._url = started.result()
        except BaseException:
            thread.join()
            raise
        self._thread = thread
        return self

    def stop(self) -> None:
        """Stop the service, after its running calls are committed and answered. Does nothing if it does not run."""
        if self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
            self._thread = None

    def client(self, **options: Any) -> Client:
        """A new client, with the arguments of `Client`; close it before the service is stopped."""
        return Client(self.url, **{"trust_env": False, **options})

    def async_client(self, **options: Any) -> AsyncClient:
        """A new asynchronous client, with the arguments of `AsyncClient`."""
        return AsyncClient(self.url, **{"trust_env": False, **options})

    def __enter__(self) -> Client:
        self.start()
        self._client = self.client()
        return self._client

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._client.close()
        self.stop()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url if self._thread else 'not running'})"

    def _run(self, started: Future[str]) -> None:
        try:
            with listen(self._settings.host, self._settings.port) as listener:
                url, gateway = address(self._settings, listener), create_app(self._settings)
                config = uvicorn_config(self._settings, gateway, lifespan="off")
                self._server = _ServerInThread(config, lambda: started.set_result(url))
                with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                    runner.run(serve(self._server, gateway, listener))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)
