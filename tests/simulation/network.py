"""The simulated network between clients and replicas: requests and responses take time, are lost, or come twice."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from batchnorm_client.core import Attempts, Response
from batchnorm_client.wire.errors import ConnectionFailed, TimedOut
from simulation.faults import Faults
from simulation.loop import PROCESS

if TYPE_CHECKING:
    from simulation.replica import Replica

READ_TIMEOUT = 6.0
"""Seconds after which a client no longer waits for a response."""


class Connections:
    """A client's connections to all replicas, behind a load balancer that picks one at random for each request.

    It takes the place of `AsyncConnections`: the client's core, which decides what to send again, is the real one.
    """

    def __init__(self, replicas: list[Replica], random: Random, faults: Faults) -> None:
        self._replicas = replicas
        self._random = random
        self._faults = faults

    async def send(self, attempts: Attempts[Any]) -> Response:
        """Send a call once. Raises as `AsyncConnections.send`."""
        faults, random = self._faults, self._random
        replica = random.choice(self._replicas)
        await asyncio.sleep(faults.way(random))
        if not replica.serving:
            raise ConnectionFailed("connection refused")
        reply: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        request = attempts.request
        scope = {
            "type": "http",
            "method": request.method,
            "path": unquote(request.target.partition("?")[0]),
            "raw_path": request.target.partition("?")[0].encode(),
            "query_string": request.target.partition("?")[2].encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
            + [(b"content-length", b"%d" % request.size)],
            "root_path": "",
        }
        body = b"".join(request.pieces)
        for number in range(1 + (random.random() < faults.request_twice)):
            if random.random() >= faults.request_lost:
                way = faults.way(random) * (1 + 20 * number)
                replica.process.spawn(self._deliver(replica, scope, body, way, reply))
        replica.connections.append(reply)
        try:
            async with asyncio.timeout(min(attempts.remaining(), READ_TIMEOUT + request.waits)):
                return await reply
        except TimeoutError:
            raise TimedOut("no response", outcome_unknown=True) from None

    async def _deliver(
        self, replica: Replica, scope: dict[str, Any], body: bytes, way: float, reply: asyncio.Future[Response]
    ) -> None:
        await asyncio.sleep(way)
        answered: dict[str, Any] = {}
        pieces: list[bytes] = []
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:  # what comes after the body is the caller's end
                await asyncio.wait([reply])
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answered["status"] = message["status"]
                answered["headers"] = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                pieces.append(bytes(message["body"]))

        await replica.gateway(scope, receive, send)
        if not answered or self._random.random() < self._faults.response_lost:
            return
        response = Response(answered["status"], answered["headers"], bytearray(b"".join(pieces)))
        await asyncio.sleep(self._faults.way(self._random))
        if not reply.done():
            reply.set_result(response)

    async def aclose(self) -> None:
        """Nothing is kept open."""


def cut(replies: list[asyncio.Future[Response]]) -> None:
    """Connections whose other end died."""
    assert PROCESS.get() is None
    for reply in replies:
        if not reply.done():
            reply.set_exception(ConnectionFailed("connection reset", outcome_unknown=True))
    replies.clear()
