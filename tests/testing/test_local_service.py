"""A service in this process, for notebooks and other people's tests."""

import asyncio
import socket
import threading

import httpx
import numpy as np
import pytest
import torch

from batchnorm_client import ConnectionFailed, InvalidRequest
from batchnorm_service.server import PortUnavailableError
from batchnorm_service.store.base import StoreRefusedError
from batchnorm_service.testing import LocalService

pytest_plugins = ["pytester"]

BATCH = np.random.default_rng(0).normal(3, 2, (6, 3)).astype(np.float32)


def test_it_is_a_service_as_long_as_the_block_runs():
    module, threads = torch.nn.BatchNorm1d(3), threading.active_count()
    with LocalService() as client:
        result = client.create_layer("obs", 3).train(BATCH)
        np.testing.assert_array_equal(result.output, module(torch.from_numpy(BATCH)).detach())
        url = client.base_url
        assert httpx.get(f"{url}/readyz").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/readyz")
    assert threading.active_count() == threads
    with pytest.raises(ConnectionFailed):
        client.layer("obs").inspect()


def test_a_file_keeps_the_layers(tmp_path):
    for number in (1, 2):
        with LocalService(tmp_path / "layers.db") as client:
            assert client.create_layer("obs", 3).train(BATCH).num_batches_tracked == number
    with LocalService() as client:
        assert list(client.layers()) == []


def test_settings_are_those_given_and_no_others(monkeypatch):
    monkeypatch.setenv("BATCHNORM_TOKEN", "secret")
    monkeypatch.setenv("BATCHNORM_STORE", "sqlite:////nowhere/layers.db")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with LocalService(max_features=2) as client, pytest.raises(InvalidRequest, match="BATCHNORM_MAX_FEATURES"):
        client.create_layer("obs", 3)
    with pytest.raises(ValueError, match="max_feature"):
        LocalService(max_feature=2)


def test_several_run_at_once_and_each_may_be_started_again():
    first, second = LocalService(), LocalService()
    for service in (first, second):
        with pytest.raises(RuntimeError, match="does not run"):
            service.client()
        assert service.start() is service
    with pytest.raises(RuntimeError, match="runs already"):
        first.start()
    assert first.url != second.url
    with second.client() as client:
        client.create_layer("obs", 3)
    first.stop()
    first.stop()
    with second.client() as client:
        assert client.layer("obs").inspect().num_batches_tracked == 0
    second.stop()
    with first as client:
        assert list(client.layers()) == []


def test_the_asynchronous_client():
    async def train(service):
        async with service.async_client() as client:
            return await (await client.create_layer("obs", 3)).train(BATCH)

    service = LocalService().start()
    try:
        assert asyncio.run(train(service)).num_batches_tracked == 1
    finally:
        service.stop()


def test_what_keeps_it_from_starting_is_raised(tmp_path):
    (tmp_path / "layers.db").write_bytes(b"no database" * 1000)
    threads = threading.active_count()
    with pytest.raises(StoreRefusedError):
        LocalService(tmp_path / "layers.db").start()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortUnavailableError):
        LocalService(port=taken.getsockname()[1]).start()
    assert threading.active_count() == threads


def test_the_fixtures(pytester):
    pytester.makeconftest('pytest_plugins = ["batchnorm_service.testing.plugin"]')
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("run", [1, 2])
        def test_each_begins_without_layers(batchnorm_client, batchnorm_service, run):
            assert batchnorm_client.base_url == batchnorm_service.url
            assert list(batchnorm_client.layers()) == []
            batchnorm_client.create_layer("obs", 3).pin("kept")
        """
    )
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)
