"""Train calls from many threads while their servers are killed, and what must be true of the answers afterwards."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx
import numpy as np
import torch
from torch import nn

CALLS = int(os.environ.get("BATCHNORM_TEST_CALLS", "600"))  # `make soak-crashes` has more
KILLS = CALLS // 200
THREADS, CHANNELS = 8, 16
LAYERS = ("first", "second", "third")
DEADLINE = 100.0  # seconds for one batch to be acknowledged, with all its retries


class Answer(NamedTuple):
    """What a caller was told of its batch."""

    seed: int
    version: int
    batch: int


class Traffic:
    """Batches with keys for three layers, each sent until it is acknowledged, some of them twice.

    Args:
        urls: of the servers; each try goes to any of them, on a connection of its own.
        kill: called in a thread of its own each time that another part of the calls is acknowledged.
        kills: how often.
    """

    def __init__(self, urls: Sequence[str], kill: Callable[[], None], kills: int) -> None:
        self._urls = urls
        self._kill = kill
        self._kills = kills
        self._acknowledged = 0
        self._lock = threading.Condition()
        self._given_up = False

    def run(self) -> dict[str, list[Answer]]:
        """Send everything; the answers by layer. Raises what a caller or `kill` met."""
        for layer in LAYERS:
            httpx.put(f"{self._urls[0]}/v1/layers/{layer}", json={"num_features": CHANNELS}).raise_for_status()
        with ThreadPoolExecutor(THREADS + 1) as pool:
            killer = pool.submit(self._kill_now_and_then)
            callers = [pool.submit(self._call, range(start, CALLS, THREADS)) for start in range(THREADS)]
            try:
                answers = [answer for caller in callers for answer in caller.result()]
            finally:
                with self._lock:
                    self._given_up = True
                    self._lock.notify_all()
            killer.result()
        return {layer: [answer for answer in answers if _layer(answer.seed) == layer] for layer in LAYERS}

    def check(self, answers: dict[str, list[Answer]]) -> None:
        """Every acknowledged batch counts once, in the order of the answers."""
        for name, told in answers.items():
            layer = httpx.get(f"{self._urls[0]}/v1/layers/{name}", timeout=30).raise_for_status().json()
            order = sorted(told, key=lambda answer: answer.batch)
            assert [answer.batch for answer in order] == list(range(1, len(told) + 1)), "no gap, no repeat"
            versions = [answer.version for answer in order]
            assert versions == sorted(versions)
            assert (layer["num_batches_tracked"], layer["version"]) == (len(told), versions[-1])
            module = nn.BatchNorm1d(CHANNELS)
            for answer in order:
                module(torch.from_numpy(_batch(answer.seed)))
            assert np.array_equal(np.array(layer["running_mean"], np.float32), module.running_mean.numpy())
            allowed = len(told) * np.spacing(module.running_var.numpy())
            assert (np.abs(np.array(layer["running_var"], np.float32) - module.running_var.numpy()) <= allowed).all()

    def _kill_now_and_then(self) -> None:
        for number in range(1, self._kills + 1):
            with self._lock:
                self._lock.wait_for(
                    lambda n=number: self._acknowledged > n * CALLS // (self._kills + 1) or self._given_up
                )
            self._kill()

    def _call(self, seeds: range) -> list[Answer]:
        rng = random.Random(seeds.start)
        answers = []
        # No connection is used twice, so that the next try meets any of the servers, or any worker of one.
        with httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0)) as http:
            for seed in seeds:
                answer = self._train(http, seed, rng)
                answers.append(answer)
                with self._lock:
                    self._acknowledged += 1
                    self._lock.notify_all()
                if rng.random() < 0.2:
                    assert self._train(http, seed, rng) == answer, "a repeat gets the first answer again"
        return answers

    def _train(self, http: httpx.Client, seed: int, rng: random.Random) -> Answer:
        body, headers = {"input": _batch(seed).tolist()}, {"Idempotency-Key": f"batch-{seed}"}
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            url = f"{rng.choice(self._urls)}/v1/layers/{_layer(seed)}/train"
            try:
                answer = http.post(url, json=body, headers=headers)
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            if answer.status_code == 200:
                told = answer.json()
                return Answer(seed, told["version"], told["num_batches_tracked"])
            assert answer.status_code == 503, answer.text
            time.sleep(0.05)
        raise AssertionError(f"batch {seed} was never acknowledged")


def _layer(seed: int) -> str:
    return LAYERS[seed % 3]


def _batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(seed % 7, 1 + seed % 3, size=(12, CHANNELS)).astype(np.float32)
