"""Callers with mixed requests, and what their layers must be."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final
from uuid import uuid4

import httpx
import numpy as np
import torch
from torch import nn

from service.account import CHANNELS, Account, batch

RECEIPT_SECONDS: Final = 20.0
PAUSE: Final = 0.01
"""Seconds between two requests of a caller."""

BINARY: Final = {"Content-Type": "application/x-npy"}


class Population:
    """A population layer that all callers fold into, and the sums of what they folded.

    Attributes:
        name: the layer's.
    """

    def __init__(self, http: httpx.Client, url: str) -> None:
        self.name = f"shared-{uuid4()}"
        self._url = f"{url}/v1/layers/{self.name}"
        self._lock = threading.Lock()
        self._folded = 0
        self._samples: list[np.ndarray] = []  # count, sum, sum of squares around 3.5, per batch
        http.put(
            self._url, json={"num_features": CHANNELS, "statistics": "population", "momentum": None}
        ).raise_for_status()

    def fold(self, values: np.ndarray) -> None:
        """Note an acknowledged batch."""
        shifted = values.astype(np.float64) - 3.5
        with self._lock:
            self._folded += 1
            self._samples.append(np.array([np.full(CHANNELS, len(values)), shifted.sum(0), (shifted**2).sum(0)]))
            if len(self._samples) == 1000:
                self._samples = [np.sum(self._samples, axis=0)]

    def check(self, http: httpx.Client) -> None:
        """The layer has every batch once."""
        layer = http.get(self._url).raise_for_status().json()
        count, total, squares = np.sum(self._samples, axis=0)
        assert layer["num_batches_tracked"] == self._folded
        assert layer["samples_tracked"] == count[0]
        mean = total / count
        np.testing.assert_allclose(layer["running_mean"], mean + 3.5, rtol=1e-5)
        np.testing.assert_allclose(layer["running_var"], (squares - count * mean**2) / (count - 1), rtol=1e-5)


class Caller(threading.Thread):
    """Sends requests of all kinds until it is stopped, and keeps the account of a layer of its own.

    Attributes:
        done: how often each kind of request was made.
        failure: what ended it early.
    """

    def __init__(self, url: str, number: int, population: Population, ended: threading.Event) -> None:
        super().__init__(daemon=True)
        self.done: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._url, self._ended, self._population = url, ended, population
        self._rng = random.Random(number)
        self._http = httpx.Client(base_url=url, timeout=60)
        self._account = Account(self._http, url, f"own-{uuid4()}")
        self._seed, self._sent = 3, 0.0
        self._kinds: list[Callable[[], object]] = [
            *[self._train] * 6,
            *[self._evaluate] * 6,
            *[self._moments, self._many, self._repeat, self._large] * 2,
            *[self._refused, self._abandoned, self._pin, self._roll_back, self._transient, self._read],
        ]

    def run(self) -> None:
        try:
            self._account.prepare()
            while not self._ended.wait(PAUSE):
                kind = self._rng.choice(self._kinds)
                kind()
                self.done[kind.__name__.strip("_").replace("_", " ")] += 1
                if self._rng.random() < 0.01:  # a connection of its own for what follows
                    self._http.close()
                    self._account.http = self._http = httpx.Client(base_url=self._url, timeout=60)
            self._account.check()
        except BaseException as error:  # reported by `Load.stop`
            self.failure = error
        finally:
            self._http.close()

    def _train(self) -> None:
        self._seed, self._sent = self._seed + 1, time.monotonic()
        self._account.train(self._seed)

    def _repeat(self) -> None:
        if time.monotonic() - self._sent < RECEIPT_SECONDS / 4:
            self._account.repeat(self._seed, replay=True)

    def _evaluate(self) -> None:
        values = torch.from_numpy(batch(self._seed))
        answer = self._http.post(f"{self._account.url}/eval", json={"input": values.tolist()}).raise_for_status()
        expected = nn.functional.batch_norm(
            values, self._account.module.running_mean, self._account.module.running_var, training=False
        )
        np.testing.assert_allclose(answer.json()["output"], expected, rtol=1e-3, atol=1e-4)

    def _moments(self) -> None:
        values = self._values()
        body = {"count": len(values), "mean": values.mean(0).tolist(), "var": values.var(0).tolist()}
        self._http.post(f"/v1/layers/{self._population.name}/moments", json=body).raise_for_status()
        self._population.fold(values)

    def _many(self) -> None:
        values = self._values()
        mine = {"count": len(values), "mean": values.mean(0).tolist(), "var": values.var(0).tolist()}
        layers = {self._population.name: mine, "nowhere": mine}
        answer = self._http.post("/v1/moments", json={"layers": layers}).raise_for_status().json()["layers"]
        assert answer["nowhere"]["status"] == 404
        self._population.fold(values)

    def _large(self) -> None:
        """A batch of 2.5 MB, which is computed in a thread."""
        values = np.repeat(self._values(), 2_500, axis=0).reshape(-1, CHANNELS, 10).astype(np.float32)
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {values.shape}, }}".ljust(117) + "\n"
        content = b"\x93NUMPY\x01\x00v\x00" + header.encode() + values.tobytes()
        self._http.post(f"{self._account.url}/eval", content=content, headers=BINARY).raise_for_status()

    def _refused(self) -> None:
        json = {"Content-Type": "application/json"}
        train = f"{self._account.url}/train"
        calls = [
            (404, "/v1/layers/nowhere/train", b'{"input": [[1]]}'),
            (400, train, b'{"input": [[1,'),
            (422, train, b'{"input": [[1, 2], [3, 4]]}'),
            (422, train, b'{"input": [[1, 2, 3, 4, NaN], [1, 2, 3, 4, 5]]}'.replace(b"NaN", b'"NaN"')),
            (415, train, b"input"),
        ]
        status, url, content = self._rng.choice(calls)
        headers = {"Content-Type": "text/plain"} if status == 415 else json
        assert self._http.post(url, content=content, headers=headers).status_code == status

    def _abandoned(self) -> None:
        """A request that ends in the middle of its body."""
        url = httpx.URL(self._url)
        with socket.create_connection((url.host, url.port), timeout=60) as connection:
            connection.sendall(b"POST /v1/layers/shared/train HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n{")

    def _pin(self) -> None:
        self._account.pin(tag := f"pin-{uuid4()}")
        self._account.state(tag)
        self._http.delete(f"{self._account.url}/pins/{tag}").raise_for_status()
        del self._account.pinned[tag]

    def _roll_back(self) -> None:
        self._http.post(f"{self._account.url}/rollback", json={"tag": "early"}).raise_for_status()
        self._account.count_rollback("early")

    def _transient(self) -> None:
        """A layer that is created, used and deleted."""
        layer = Account(self._http, self._url, f"transient-{uuid4()}")
        layer.prepare()
        layer.check()
        self._http.delete(f"{layer.url}?pins=delete").raise_for_status()

    def _read(self) -> None:
        paths = ("/v1/layers?limit=100", "/metrics", "/readyz", f"{self._account.url}/history", "/openapi.json")
        self._http.get(self._rng.choice(paths)).raise_for_status()

    def _values(self) -> np.ndarray:
        return batch(self._rng.randrange(1000))


class Load:
    """Several callers of a service.

    Args:
        url: the service.
        callers: how many.
    """

    def __init__(self, url: str, callers: int) -> None:
        self._url = url
        with httpx.Client(timeout=60) as http:
            self._population = Population(http, url)
        self._ended = threading.Event()
        self._callers = [Caller(url, number, self._population, self._ended) for number in range(callers)]

    def start(self) -> None:
        for caller in self._callers:
            caller.start()

    @property
    def failed(self) -> bool:
        """Whether a caller has met something wrong."""
        return any(caller.failure for caller in self._callers)

    def stop(self) -> Counter[str]:
        """End the callers. Returns how often each kind of request was made; raises what was wrong."""
        self._ended.set()
        done: Counter[str] = Counter()
        for caller in self._callers:
            caller.join()
            if caller.failure is not None:
                raise caller.failure
            done += caller.done
        with httpx.Client(timeout=60) as http:
            self._population.check(http)
        return done
