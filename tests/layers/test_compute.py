"""Where arithmetic runs."""

import os
import sys
import threading

import pytest
import torch

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_service.engine.normalize import eval_step
from batchnorm_service.engine.state import initial_state
from batchnorm_service.layers.compute import ComputeExecutor
from batchnorm_service.runtime import RUNTIME

pytestmark = pytest.mark.anyio


@pytest.fixture
def computing():
    computing = ComputeExecutor("cpu", inline_bytes=8, runtime=RUNTIME)
    yield computing
    computing.close()


async def test_small_work_is_done_at_once_and_large_work_in_a_thread(computing):
    assert await computing.run(8, threading.get_ident) == threading.get_ident()
    assert await computing.run(9, threading.get_ident) != threading.get_ident()


async def test_small_bodies_are_read_at_once_and_large_ones_in_a_thread(computing):
    assert await computing.run_codec(8, threading.get_ident) == threading.get_ident()
    assert await computing.run_codec(9, threading.get_ident) != threading.get_ident()


@pytest.mark.skipif(sys.platform != "linux", reason="only there a thread has a niceness")
async def test_codecs_do_not_wait_for_others(computing):
    """They hold Python's lock: whoever keeps them from running keeps the event loop from it, too."""

    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert await computing.run_codec(9, niceness) == niceness()


@pytest.mark.skipif(sys.platform != "linux", reason="only there a thread has a niceness")
async def test_large_work_waits_for_small_work(computing):
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert await computing.run(9, niceness) > await computing.run(8, niceness)


async def test_work_away_is_never_done_on_the_event_loop(monkeypatch):
    seen = []

    def fake(device, function, *args):
        seen.append((device, threading.current_thread()))
        return function(*args)

    cuda = torch.device("cuda", 1)
    monkeypatch.setattr("batchnorm_service.layers.compute.staged", fake)
    monkeypatch.setattr("batchnorm_service.layers.compute.device", lambda name: {"cuda:1": cuda}[name])
    computing = ComputeExecutor("cpu", inline_bytes=1 << 20, runtime=RUNTIME)
    here, there = (initial_state(LayerConfig(num_features=3, device=device)) for device in (None, "cuda:1"))
    batch = torch.ones(4, 3)
    try:
        assert computing.off_cpu(there)
        assert not computing.off_cpu(here)
        outputs = [await computing.run(batch.nbytes, eval_step, layer, batch) for layer in (here, there)]
    finally:
        computing.close()
    assert torch.equal(*outputs)
    ((device, thread),) = seen
    assert device == cuda
    assert thread is not threading.current_thread()
