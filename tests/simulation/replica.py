"""A replica of the service: the real gateway and the real layers, in a process that can be killed and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from fastapi import FastAPI

from batchnorm_client.core import Response
from batchnorm_service.layers import Layers, LayersOptions
from batchnorm_service.rest import ApiOptions, Gateway
from batchnorm_service.rest.application import build_app, build_gateway
from simulation.embedded import EmbeddedStore
from simulation.faults import Faults
from simulation.loop import Process
from simulation.network import cut
from simulation.runtimes import ServiceRuntime
from simulation.store import Server, SimulatedStore


@asynccontextmanager
async def _lifespan(_: Any) -> AsyncGenerator[None]:
    yield


_APPS: list[FastAPI] = []
"""Used again by other replicas: making the routes takes longer than a world."""


class Replica:
    """One replica.

    Attributes:
        process: its present one.
        gateway: the service in it.
        serving: whether it takes requests.
        connections: replies that clients wait for.
    """

    def __init__(
        self,
        name: str,
        server: Server,
        random: Random,
        faults: Faults,
        *,
        exclusive: bool,
        threaded: bool,
        **keeping: Any,
    ) -> None:
        self.name = name
        self._server = server
        self._random = random
        self._faults = faults
        self._exclusive = exclusive
        self._threaded = threaded
        self._options = LayersOptions(
            resident_layers=random.choice((1, 1, 1, 2, 100)),
            queue_length=random.choice((2, 1024)),
            store_timeout=random.choice((1.0, 10.0)),
            inline_bytes=random.choice((0, 1 << 20)),
            **keeping,
        )
        self._graveyard: list[Any] = []  # what killed processes had is not collected: that would run their code
        self.runtime = ServiceRuntime(random)
        self.connections: list[asyncio.Future[Response]] = []
        self.process: Process
        self._store: SimulatedStore
        self.gateway: Gateway
        self.serving = False

    async def start(self) -> None:
        """Begin to serve."""
        self.process = Process(self.name)
        if self._threaded:
            store: SimulatedStore = EmbeddedStore(self._server, self._random, self._faults, self.runtime)
        else:
            store = SimulatedStore(self._server, self._random, self._faults, exclusive=self._exclusive)
        self._store = store
        layers = Layers(store, self._options, self.runtime)

        self.gateway = build_gateway(_APPS.pop() if _APPS else build_app(_lifespan), layers, ApiOptions())
        await store.open()
        self.serving = True

    def kill(self) -> None:
        """As SIGKILL does. An embedded store dies, too; without power, it may lose unsynced writes."""
        self.serving = False
        self.process.kill()
        self._graveyard.append((self.process, self.gateway))
        _APPS.append(self.gateway.app)
        if isinstance(self._store, EmbeddedStore):
            self._store.kill()
        elif self._exclusive and self._random.random() < 0.5:
            self._server.crash()
        cut(self.connections)

    def stop(self) -> None:
        """The world is over."""
        if self.process.alive:
            self.process.kill()
            self.runtime.kill_thread()
            _APPS.append(self.gateway.app)
