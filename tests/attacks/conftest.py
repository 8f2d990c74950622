"""A running service under attack, and what is measured of it."""

import asyncio
import contextlib
import resource

import httpx
import pytest

from batchnorm_client.wire.media_types import JSON
from fast_path.running import answer, get, post
from service.conftest import start  # noqa: F401 - a fixture

FILES = 11_000


@pytest.fixture
def anyio_backend():
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def many_files():
    """Permission for this process, and the services that it starts, to open many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FILES:
        pytest.skip(f"only {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FILES), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Victim:
    """A service with the layers `a` and `b`, as a process of its own."""

    def __init__(self, process):
        self._pid = process.process.pid
        self.url = process.url
        self.port = httpx.URL(process.url).port
        for name in "ab":
            httpx.put(f"{self.url}/v1/layers/{name}", json={"num_features": 2}).raise_for_status()

    def memory(self):
        """Resident memory in bytes."""
        with open(f"/proc/{self._pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    @contextlib.asynccontextmanager
    async def connections(self, count, sent=b"", **options):
        """So many connections on which this was sent, each as (reader, writer); aborted at the end."""
        opened = []
        try:
            for _ in range(count):
                opened.append(await asyncio.open_connection("127.0.0.1", self.port, **options))
                opened[-1][1].write(sent)
            yield opened
        finally:
            for _, writer in opened:
                writer.transport.abort()

    async def ask(self, request):
        """The status of a call on a connection of its own."""
        async with asyncio.timeout(60), self.connections(1, request) as ((reader, _),):
            return (await answer(reader))[0]

    async def serves(self):
        """Whether calls on both layers, and one by ASGI, are answered."""
        calls = (eval_of("a"), eval_of("b"), get("/v1/layers/b"))
        try:
            return [await self.ask(call) for call in calls] == [200, 200, 200]
        except (ConnectionError, asyncio.IncompleteReadError):
            return False


def eval_of(layer, call="eval"):
    """A small call on a layer."""
    return post(f"/v1/layers/{layer}/{call}", b'{"input": [[1, 2], [3, 5]]}', JSON)


@pytest.fixture
def attacked(start, tmp_path):  # noqa: F811
    """`attacked(BATCHNORM_...="1")` runs a service over SQLite."""
    return lambda **variables: Victim(start("--store", f"sqlite:///{tmp_path}/layers.db", **variables))
