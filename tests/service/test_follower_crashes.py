"""Followers of one layer while their service and some of them are killed: what is acknowledged counts once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.harness import environment
from store.valkey_servers import free_port

FOLLOWERS = int(os.environ.get("BATCHNORM_TEST_FOLLOWERS", "5"))  # `make soak-followers` has 50
KILLED = FOLLOWERS // 2
SAMPLES, SERVICE_KILLS = 400, 3
ROUTE = "/v1/layers/obs"
PROGRAM = Path(__file__).parent / "programs" / "follow.py"


def _follower(url: str, channel: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), url, "obs", str(channel), str(SAMPLES)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(600)
def test_every_acknowledged_sample_counts_once(start: Any, store: str) -> None:
    """Of each channel's sum: it is the number of samples that were folded for the follower of that channel."""
    arguments = ("--store", store, "--port", str(free_port()))
    server = start(*arguments)
    url = server.url
    config = {"num_features": FOLLOWERS, "statistics": "population", "momentum": None}
    httpx.put(url + ROUTE, json=config).raise_for_status()
    followers = [_follower(url, channel) for channel in range(FOLLOWERS)]
    told: list[list[str]] = [[] for _ in followers]
    try:
        for channel, follower in enumerate(followers):  # all are at work
            assert follower.stdout is not None
            told[channel].append(follower.stdout.readline())
        for number in range(SERVICE_KILLS):
            for follower in followers[: KILLED * (number + 1) // SERVICE_KILLS]:
                follower.kill()
            server.close()
            time.sleep(0.1)
            server = start(*arguments)
            time.sleep(0.2)
        for channel, follower in enumerate(followers):
            output, errors = follower.communicate(timeout=300)
            told[channel] += output.splitlines()
            assert follower.returncode == 0 or channel < KILLED, errors
    finally:
        for follower in followers:
            follower.kill()
            follower.communicate()
    layer = httpx.get(url + ROUTE, timeout=30).raise_for_status().json()
    folded = [round(mean * layer["samples_tracked"], 2) for mean in layer["running_mean"]]
    acknowledged = [max(map(int, lines)) for lines in told]
    assert folded[KILLED:] == [SAMPLES] * (FOLLOWERS - KILLED)
    for count, least in zip(folded[:KILLED], acknowledged[:KILLED], strict=True):
        assert count == int(count)
        assert least <= count <= SAMPLES
    assert layer["samples_tracked"] == layer["num_batches_tracked"] == sum(folded)
