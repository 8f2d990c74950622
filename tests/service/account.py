"""What a layer of a service must be: the account of a test that trains it, and loses answers."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import httpx
import numpy as np
import torch
from safetensors.numpy import load
from torch import nn

CHANNELS = 5
TENSORS = ("running_mean", "running_var", "weight", "bias")


def batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(seed % 7, 1 + seed % 3, size=(12, CHANNELS)).astype(np.float32)


def digest(tensors: dict[str, np.ndarray]) -> str:
    """The digest of a float32 layer with the default config, from the bytes that the contract names."""
    found = hashlib.sha256(b"batchnorm-state-1\nfloat32\n1\n" + struct.pack("<d", 1e-5) + b"\0")
    for name in TENSORS:
        found.update(b"\1" + struct.pack("<Q", CHANNELS) + tensors[name].astype("<f4").tobytes())
    return f"sha-256:{found.hexdigest()}"


class Account:
    """A layer, and torch's module that is fed the batches that count.

    Attributes:
        pinned: by tag, the tensors of the layer when it was pinned.
        told: by seed, the number of an acknowledged batch.
    """

    def __init__(self, http: httpx.Client, url: str, name: str) -> None:
        self.http, self.url, self.name = http, f"{url}/v1/layers/{name}", name
        self.module = nn.BatchNorm1d(CHANNELS)
        self.pinned: dict[str, dict[str, np.ndarray]] = {}
        self.told: dict[int, int] = {}

    def prepare(self) -> None:
        """Create it, with three batches and a pin after the second."""
        assert self.create().status_code == 201
        self.train(1, 2)
        self.pin("early")
        self.train(3)

    def create(self) -> httpx.Response:
        return self.http.put(self.url, json={"num_features": CHANNELS})

    def send(self, seed: int) -> httpx.Response:
        """A batch under its own key; it does not count yet."""
        return self.http.post(f"{self.url}/train", json={"input": batch(seed).tolist()}, headers=self.key(f"b{seed}"))

    def count(self, seed: int) -> None:
        self.module(torch.from_numpy(batch(seed)))

    def train(self, *seeds: int) -> None:
        """Batches that must be acknowledged as new ones."""
        for seed in seeds:
            self.repeat(seed, replay=False)

    def repeat(self, seed: int, *, replay: bool) -> None:
        """A batch, perhaps again; a replay gets the first answer's number and counts nothing."""
        answer = self.send(seed)
        assert answer.status_code == 200, answer.text
        assert ("Idempotent-Replay" in answer.headers) == replay
        if not replay:
            self.count(seed)
            self.told[seed] = self.batches
        assert answer.json()["num_batches_tracked"] == self.told[seed]

    def pin(self, tag: str) -> None:
        answer = self.send_pin(tag)
        assert answer.status_code == 201, answer.text
        self.pinned[tag] = self.expected

    def send_pin(self, tag: str) -> httpx.Response:
        return self.http.put(f"{self.url}/pins/{tag}", json={}, headers=self.key(f"pin-{tag}"))

    def rollback(self, tag: str) -> httpx.Response:
        return self.http.post(f"{self.url}/rollback", json={"tag": tag}, headers=self.key(f"to-{tag}"))

    def count_rollback(self, tag: str) -> None:
        with torch.no_grad():
            for name, values in self.pinned[tag].items():
                getattr(self.module, name).copy_(torch.from_numpy(values))

    def key(self, key: str) -> dict[str, str]:
        return {"Idempotency-Key": f"{self.name}-{key}"}

    @property
    def batches(self) -> int:
        return int(self.module.num_batches_tracked)

    @property
    def expected(self) -> dict[str, np.ndarray]:
        """torch's tensors, copied."""
        return {name: value.numpy().copy() for name, value in self.module.state_dict().items()}

    def check(self) -> dict[str, Any]:
        """The layer, its pins and its history are as they must be. Returns all that is served of them."""
        layer = self.http.get(self.url).raise_for_status().json()
        assert layer["num_batches_tracked"] == self.batches
        newest = self.state()
        self._compare(newest, self.expected)
        pins = self.http.get(f"{self.url}/pins").raise_for_status().json()["pins"]
        assert {pin["tag"] for pin in pins} == self.pinned.keys()
        states = {pin["tag"]: self.state(pin["tag"], pin["digest"]) for pin in pins}
        for tag, tensors in states.items():
            self._compare(tensors, self.pinned[tag])
        history = self.http.get(f"{self.url}/history?limit=1000").raise_for_status().json()["history"]
        versions = [entry["version"] for entry in history]
        assert versions == sorted(set(versions), reverse=True)
        assert versions[0] == layer["version"]
        assert {pin["version"] for pin in pins} <= {*versions}
        kept = {entry["version"]: self.state(entry["version"], entry["digest"]) for entry in history}
        assert [entry["num_batches_tracked"] for entry in history] == [
            int(kept[version]["num_batches_tracked"]) for version in versions
        ]
        served = {**states, **kept}
        return {"layer": layer, "pins": pins, "history": history} | {
            f"state {at}": {name: value.tobytes() for name, value in tensors.items()} for at, tensors in served.items()
        }

    def state(self, at: object = "", expected_digest: str = "") -> dict[str, np.ndarray]:
        """The tensors of a state, whose digest must be theirs."""
        answer = self.http.get(f"{self.url}/state", params={"at": at} if at else {}).raise_for_status()
        tensors = load(answer.content)
        assert answer.headers["Batchnorm-Digest"] == digest(tensors)
        assert expected_digest in {"", digest(tensors)}
        return tensors

    def _compare(self, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"running_var"}:
            assert np.array_equal(found[name], expected[name]), name
        allowed = expected["num_batches_tracked"] * np.spacing(expected["running_var"])
        assert (np.abs(found["running_var"] - expected["running_var"]) <= allowed).all()
