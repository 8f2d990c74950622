"""The service behind its protocol in the test's own process, and requests as bytes."""

import asyncio
import contextlib

import pytest
from uvicorn.server import ServerState

from batchnorm_client.wire.media_types import JSON
from batchnorm_service.app import create_app
from batchnorm_service.fast_path.protocol import Protocol
from batchnorm_service.rest import Gateway
from batchnorm_service.server import uvicorn_config
from batchnorm_service.settings import Settings
from batchnorm_service.store.memory import MemoryStore


class Running:
    """The service behind its protocol, in this process.

    Attributes:
        by_asgi: how many requests came by ASGI.
    """

    def __init__(self, port, state, gateway):
        self.port = port
        self.state = state
        self.gateway = gateway
        self.by_asgi = 0

    async def ask(self, *requests):
        """The answers to requests that are sent at once on one connection, each as (status, headers, body)."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(b"".join(requests))
            return [await answer(reader) for _ in requests]
        finally:
            writer.close()
            await writer.wait_closed()


async def until(condition):
    for _ in range(1000):
        met = condition()
        if await met if asyncio.iscoroutine(met) else met:
            return
        await asyncio.sleep(0.01)
    pytest.fail("it never came to that")


async def answer(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


def post(path, body, media=JSON, headers=""):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {media}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def put(name, headers):
    return post(f"/v1/layers/{name}", b'{"num_features": 2}', JSON, headers).replace(b"POST", b"PUT", 1)


@contextlib.asynccontextmanager
async def listening(gateway, settings):
    """The port at which a gateway is served as uvicorn would, in this event loop, and uvicorn's state."""
    state = ServerState()
    state.default_headers = [(b"date", b"today")]
    config = uvicorn_config(settings, gateway, lifespan="off")
    config.load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Protocol(config, state, {}, loop), "127.0.0.1", 0, ssl=config.ssl)
    try:
        yield server.sockets[0].getsockname()[1], state
    finally:
        server.close()
        for protocol in list(state.connections):
            protocol.transport.abort()
        # Whoever asked with HEAD has the whole response before its call ends.
        await until(lambda: not state.connections and not state.tasks)


@contextlib.asynccontextmanager
async def serving(monkeypatch, **settings):
    chosen = Settings(**settings)
    gateway = create_app(chosen, MemoryStore())
    by_asgi = Gateway.__call__

    async def counted(self, scope, receive, send):
        running.by_asgi += scope["type"] == "http"
        await by_asgi(self, scope, receive, send)

    monkeypatch.setattr(Gateway, "__call__", counted)
    async with gateway.app.router.lifespan_context(gateway.app), listening(gateway, chosen) as (port, state):
        running = Running(port, state, gateway)
        token = f"Authorization: Bearer {settings['token']}\r\n" if "token" in settings else ""
        for name in ("bn", "bm"):
            assert (await running.ask(put(name, token)))[0][0] == 201
        running.by_asgi = 0
        yield running
        assert gateway.running == 0
        await until(lambda: gateway.transfers.buffered == 0)


def get(path, headers=""):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()
