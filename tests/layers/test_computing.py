"""Where arithmetic runs."""

import os
import sys
import threading

import pytest

from batchnorm_service.layers.computing import Computing

pytestmark = pytest.mark.anyio


@pytest.fixture
def computing():
    computing = Computing("cpu", inline_bytes=8)
    yield computing
    computing.close()


async def test_small_work_is_done_at_once_and_large_work_in_a_thread(computing):
    assert await computing.run(8, threading.get_ident) == threading.get_ident()
    assert await computing.run(9, threading.get_ident) != threading.get_ident()


@pytest.mark.skipif(sys.platform != "linux", reason="only there a thread has a niceness")
async def test_large_work_waits_for_small_work(computing):
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert await computing.run(9, niceness) > await computing.run(8, niceness)
