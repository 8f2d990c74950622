"""The runtime of a client: a test that owns it owns clock, chance, sleep and keys, and waits for nothing."""

import asyncio

import httpx
import numpy as np
import pytest

from batchnorm_client import AsyncClient, Client, Retry, StoreUnavailable
from batchnorm_client.core.runtime import AsyncRuntime, SyncRuntime

X = np.ones((4, 3), np.float32)
WAITS = [0.0875, 0.175, 0.35, 0.7, 1.4]
"""0.1, 0.2, ... seconds, a quarter of the half at random off each: `random` is 0.75."""


class Owned:
    """Time passes only in `sleep`."""

    def __init__(self):
        self.seconds, self.slept = 0.0, []

    def now(self):
        return self.seconds

    def random(self):
        return 0.75

    def key(self):
        return "the-only-key"

    def _pass(self, seconds):
        self.seconds += seconds
        self.slept.append(seconds)


class OwnedSync(Owned, SyncRuntime):
    def sleep(self, seconds):
        self._pass(seconds)


class OwnedAsync(Owned, AsyncRuntime):
    async def sleep(self, seconds):
        self._pass(seconds)


def down(keys):
    def handle(request):
        keys.append(request.headers["Idempotency-Key"])
        return httpx.Response(503, json={"type": "/problems/store-unavailable", "detail": "away"})

    return httpx.MockTransport(handle)


RETRY = Retry(attempts=6, deadline=60)


def test_the_blocking_client():
    keys = []
    with httpx.Client(transport=down(keys), base_url="http://h") as http, Client(http=http, retry=RETRY) as client:
        client._runtime = OwnedSync()
        with pytest.raises(StoreUnavailable):
            client.layer("x").train(X)
    assert client._runtime.slept == pytest.approx(WAITS)
    assert keys == ["the-only-key"] * 6


def test_the_client_that_does_not_block():
    keys = []

    async def call():
        async with httpx.AsyncClient(transport=down(keys), base_url="http://h") as http:
            client = AsyncClient(http=http, retry=RETRY)
            client._runtime = OwnedAsync()
            with pytest.raises(StoreUnavailable):
                await client.layer("x").train(X)
            return client._runtime.slept

    assert asyncio.run(call()) == pytest.approx(WAITS)
    assert keys == ["the-only-key"] * 6


def test_the_deadline_is_on_its_clock():
    keys = []
    with httpx.Client(transport=down(keys), base_url="http://h") as http:
        client = Client(http=http, retry=Retry(attempts=100, deadline=1))
        client._runtime = OwnedSync()
        with pytest.raises(StoreUnavailable):
            client.layer("x").train(X)
    assert client._runtime.slept == pytest.approx(WAITS[:3])
