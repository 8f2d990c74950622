"""Invariant 2 of the design: an acknowledged batch is in the running statistics exactly once, whatever crashed."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import nn

from store.valkey_servers import free_port

CALLS, THREADS, KILLS, CHANNELS = 240, 6, 6, 16
ROUTE = "/v1/layers/crashes"


def _batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(seed % 7, 1 + seed % 3, size=(12, CHANNELS)).astype(np.float32)


def _train(url: str, seed: int) -> tuple[int, int, bool]:
    """One batch under one key, until it is acknowledged."""
    body, headers = {"input": _batch(seed).tolist()}, {"Idempotency-Key": f"batch-{seed}"}
    with httpx.Client(base_url=url, timeout=10) as http:
        for _ in range(2000):
            try:
                answer = http.post(f"{ROUTE}/train", json=body, headers=headers)
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            if answer.status_code == 200:
                return seed, answer.json()["num_batches_tracked"], "idempotent-replay" in answer.headers
            assert answer.status_code == 503, answer.text
            time.sleep(0.05)
    raise AssertionError(f"batch {seed} was never acknowledged")


@pytest.mark.timeout(300)
def test_batches_survive_kill_9_and_are_counted_once(start: Any, store: str) -> None:
    arguments = ("--store", store, "--port", str(free_port()))
    server = start(*arguments)
    url = server.url
    httpx.put(url + ROUTE, json={"num_features": CHANNELS}).raise_for_status()
    rng = random.Random(3)
    done = threading.Event()

    def kill_again_and_again() -> int:
        nonlocal server
        for kills in range(KILLS):
            if done.wait(rng.uniform(0.05, 0.4)):
                return kills
            server.close()
            server = start(*arguments)
        return KILLS

    with ThreadPoolExecutor(THREADS + 1) as pool:
        killer = pool.submit(kill_again_and_again)
        try:
            answers = list(pool.map(lambda seed: _train(url, seed), range(CALLS)))
        finally:
            done.set()
        assert killer.result() > 0
    layer = httpx.get(url + ROUTE).raise_for_status().json()
    order = sorted(answers, key=lambda answer: answer[1])
    assert [number for _, number, _ in order] == list(range(1, CALLS + 1))
    assert layer["num_batches_tracked"] == CALLS
    module = nn.BatchNorm1d(CHANNELS)
    for seed, _, _ in order:
        module(torch.from_numpy(_batch(seed)))
    assert np.array_equal(np.array(layer["running_mean"], np.float32), module.running_mean.numpy())
    allowed = CALLS * np.spacing(module.running_var.numpy())
    assert (np.abs(np.array(layer["running_var"], np.float32) - module.running_var.numpy()) <= allowed).all()
