"""Wrong tokens are answered late, valid ones are not; whatever is sent, memory is bounded."""

import asyncio
import logging

import pytest

from batchnorm_service.rest.security import Failures, failures
from batchnorm_service.runtime import Runtime
from batchnorm_service.tokens import Scope, add_token
from fast_path.running import until

pytestmark = pytest.mark.anyio

CALLS = [("GET", "/v1/layers"), ("POST", "/v1/layers/bn/eval"), ("POST", "/v1/layers/bn/train"), ("GET", "/nowhere")]


class Virtual(Runtime):
    """A clock that stands still, and sleeps that are noted."""

    def __init__(self):
        self.time = 0.0
        self.slept = []

    def now(self):
        return self.time

    async def sleep(self, seconds):
        self.slept.append(seconds)


@pytest.fixture
def slept(monkeypatch):
    """The sleeps of the service, which are left out."""
    noted = []

    async def sleep(_self, seconds):
        noted.append(seconds)

    monkeypatch.setattr(Runtime, "sleep", sleep)
    return noted


async def test_only_wrong_tokens_are_delayed(serve, slept, tmp_path):
    token, _ = add_token(tmp_path / "tokens", Scope.READ, "team1.")
    async with serve(token="full", tokens_file=tmp_path / "tokens") as service:
        for authorization, delays in ((None, 0), ("Bearer full", 0), (f"Bearer {token}", 0), ("Bearer wrong", 4)):
            slept.clear()
            headers = {} if authorization is None else {"Authorization": authorization}
            async with service.client(**headers) as client:
                for method, path in CALLS:
                    answer = await client.request(method, path, json={"input": [[1, 2]]})
                    assert (answer.status_code == 401) == (authorization is None or delays > 0)
            assert len(slept) == delays
            assert all(seconds > 0 for seconds in slept)


async def test_a_wrong_token_is_counted_once(serve, slept):
    """Of a POST both ways in check the token."""
    async with serve(token="full") as service, service.client(authorization="Bearer wrong") as client:
        for method, path in CALLS:
            await client.request(method, path, json={})
        assert service.gateway.guard.failures.total == len(CALLS)


async def test_public_paths_ask_nobody(serve, slept):
    async with serve(token="full") as service, service.client(authorization="Bearer wrong") as client:
        assert (await client.get("/healthz")).status_code == 200
    assert slept == []


async def test_when_too_many_wait_the_next_is_answered_at_once_and_its_connection_closed(serve, monkeypatch):
    monkeypatch.setattr(failures, "MAX_DELAYED", 2)
    waiting = asyncio.Event()

    async def sleep(_self, _seconds):
        await waiting.wait()

    monkeypatch.setattr(Runtime, "sleep", sleep)
    async with serve(token="full") as service, service.client(authorization="Bearer wrong") as client:
        delayed = [asyncio.create_task(client.get("/v1/layers")) for _ in range(2)]
        await until(lambda: service.gateway.guard.failures.delayed == 2)
        for _ in range(3):
            answer = await client.get("/v1/layers")
            assert (answer.status_code, answer.headers["connection"]) == (401, "close")
        async with service.client(authorization="Bearer full") as allowed:
            assert (await allowed.get("/v1/layers")).status_code == 200
        assert not any(task.done() for task in delayed)
        waiting.set()
        for answer in await asyncio.gather(*delayed):
            assert answer.status_code == 401
            assert "connection" not in answer.headers
        assert service.gateway.guard.failures.delayed == 0


async def test_delays_grow_by_address_up_to_a_second_and_are_forgotten():
    runtime = Virtual()
    counted = Failures(runtime)
    for _ in range(5):
        assert await counted.delay("10.0.0.1")
    assert runtime.slept == [0.25, 0.5, 1.0, 1.0, 1.0]
    await counted.delay("10.0.0.2")
    runtime.time = 59.9
    await counted.delay("10.0.0.1")
    runtime.time = 120
    await counted.delay("10.0.0.1")
    assert runtime.slept[5:] == [0.25, 1.0, 0.25]
    assert (counted.total, counted.delayed) == (8, 0)


async def test_addresses_are_forgotten_when_there_are_many():
    counted = Failures(Virtual())
    for number in range(3000):
        await counted.delay(f"10.0.{number}")
    assert len(counted._by_address) == 1024
    for _ in range(10_000):
        await counted.delay("10.0.2999")
    assert counted.total == 13_000


async def test_the_log_says_who_sends_them_and_no_token(serve, slept, caplog):
    with caplog.at_level(logging.DEBUG):
        async with serve(token="full") as service, service.client(authorization="Bearer gu3ss") as client:
            for _ in range(1000):
                await client.get("/v1/layers")
    lines = [record.getMessage() for record in caplog.records if "wrong token" in record.getMessage()]
    assert len(lines) == 10
    assert "127.0.0.1" in lines[0]
    assert "gu3ss" not in caplog.text


async def test_the_cache_of_verified_tokens_is_bounded(serve, slept):
    """Each spelling of the header has an entry of its own."""
    async with serve(token="full") as service, service.client() as client:
        for number in range(2000):
            answer = await client.get("/v1/layers", headers={"Authorization": f"Bearer{' ' * (number + 1)}full"})
            assert answer.status_code == 200
            await client.get("/v1/layers", headers={"Authorization": f"Bearer wrong{number}"})
        assert 0 < len(service.gateway.guard._known) <= 1024
