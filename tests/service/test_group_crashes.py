"""Killing the server between the shards of a group: nothing acknowledged is lost, and retries complete the group."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import nn

from batchnorm_client import Client, ConnectionFailed, Retry
from store.valkey_servers import free_port

SIZES = (5, 1, 6)
X = np.random.default_rng(7).normal(1, 2, size=(12, 4)).astype(np.float32)
SHARDS = np.split(X, np.cumsum(SIZES)[:-1])
FIRST = np.full((3, 4), [1, 2, 3, 4], np.float32) * np.array([[1], [2], [4]], np.float32)
PATIENT = Retry(attempts=1000, wait_initial=0.02, wait_max=0.1, deadline=100)


def _changed(file: Path, before: bytes) -> None:
    """Wait until the store has committed something more."""
    for _ in range(1000):
        if file.read_bytes() != before:
            return
        time.sleep(0.02)
    raise AssertionError("the shard did not get into the store")


def test_a_group_survives_kill_9_between_its_shards(start: Any, store: str, tmp_path: Path) -> None:
    arguments = ("--store", store, "--port", str(free_port()))
    server = start(*arguments)
    url, log = server.url, tmp_path / "layers.db-wal"
    with (
        Client(url, retry=Retry(attempts=1, deadline=100)) as once,
        Client(url, retry=PATIENT) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        layer = client.create_layer("crashes", 4)
        acknowledged = layer.train(FIRST, key="first")

        def train(client: Client, index: int) -> Any:
            return client.layer("crashes").train(SHARDS[index], key=f"member-{index}", group="g", size=3, timeout=90)

        before = log.read_bytes()
        first = pool.submit(train, once, 0)
        _changed(log, before)  # the first shard came; nobody else changes anything
        server.close()  # SIGKILL
        with pytest.raises(ConnectionFailed) as raised:
            first.result(timeout=90)
        assert raised.value.outcome_unknown
        server = start(*arguments)
        assert layer.inspect().num_batches_tracked == acknowledged.num_batches_tracked == 1
        # The first member is still silent: its shard has survived, or these two would wait in vain.
        results = [one.result(timeout=90) for one in [pool.submit(train, client, index) for index in (1, 2)]]
        server.close()
        start(*arguments)
        results = [train(client, 0), *results]
        again = train(client, 2)
    assert (results[0].replayed, again.replayed) == (True, True)
    assert {one.num_batches_tracked for one in results} == {2}
    np.testing.assert_array_equal(again.output, results[2].output)
    module = nn.BatchNorm1d(4)
    module(torch.from_numpy(FIRST))
    expected = module(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(np.concatenate([one.output for one in results]), expected, rtol=1e-5, atol=1e-5)
    document = httpx.get(url + "/v1/layers/crashes").json()
    np.testing.assert_allclose(document["running_mean"], module.running_mean, rtol=1e-5)
    np.testing.assert_allclose(document["running_var"], module.running_var, rtol=1e-5)
    assert (document["num_batches_tracked"], document["samples_tracked"]) == (2, 15)


def test_members_that_retry_through_a_crash_complete_the_group(start: Any, store: str, tmp_path: Path) -> None:
    arguments = ("--store", store, "--port", str(free_port()))
    server = start(*arguments)
    url, log = server.url, tmp_path / "layers.db-wal"
    with Client(url, retry=PATIENT) as client, ThreadPoolExecutor(3) as pool:
        layer = client.create_layer("crashes", 4, statistics="population")

        def train(index: int) -> Any:
            return layer.train_local(SHARDS[index], group="g", size=3, timeout=90)

        waiting = []
        for index in range(3):
            before = log.read_bytes()
            waiting.append(pool.submit(train, index))
            if index < 2:
                _changed(log, before)
                server.close()
                server = start(*arguments)
        results = [one.result(timeout=90) for one in waiting]
        document = layer.inspect()
    exact = X.astype(np.float64)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(np.concatenate([one.output for one in results]), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(document.running_var, exact.var(0, ddof=1), rtol=1e-6)
    assert (document.num_batches_tracked, document.samples_tracked) == (1, 12)
