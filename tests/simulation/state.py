"""A layer's state as the checker reads it from a record, without the service's code."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from safetensors.numpy import load

from simulation.operations import Operation

Vector = np.ndarray[Any, Any]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@dataclass(frozen=True)
class State:
    """A record, read without the service's code: a safetensors file with torch's names.

    Attributes:
        config: as JSON.
        tensors: by name.
        samples: values per channel that were folded.
        operation: what made it.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Vector]
    samples: int
    operation: str = ""

    @property
    def tracks(self) -> bool:
        """Whether batches are folded."""
        return bool(self.config["track_running_stats"])

    @property
    def batches(self) -> int:
        """num_batches_tracked; 0 where the layer keeps none."""
        return int(self.tensors.get("num_batches_tracked", 0))


@lru_cache(maxsize=512)
def read(data: bytes) -> State:
    """The state in a record."""
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    config, samples = json.loads(metadata["config"]), int(metadata["samples_tracked"])
    return State(config, load(data), samples, metadata["operation"])


@lru_cache(maxsize=512)
def digest(data: bytes) -> str:
    """The digest of the state in a record, as shared/http-api.md has it."""
    state = read(data)
    config = state.config
    parts = [b"batchnorm-state-1\n%b\n%d\n" % (config["dtype"].encode(), config["channel_axis"])]
    parts.append(struct.pack("<d", config["eps"]) + b"\0")  # no layer here clips
    for name in ("running_mean", "running_var", "weight", "bias"):
        vector = state.tensors[name].astype("<f4")
        parts.append(struct.pack("<BQ", 1, len(vector)) + vector.tobytes())
    return "sha-256:" + hashlib.sha256(b"".join(parts)).hexdigest()


def shows(one: Operation, state: State) -> bool:
    """Whether a read shows this state's numbers."""
    if one.kind == "inspect":
        names = ("running_mean", "running_var", "weight", "bias")
        return all(np.allclose(getattr(one.result, name), state.tensors[name], **TOLERANCE) for name in names)
    batch = one.arguments["batch"].astype(np.float64)
    mean, var = state.tensors["running_mean"], state.tensors["running_var"]  # also where tracking is off, as in torch
    return np.allclose(one.result.output, normalized(batch, mean, var, state), **TOLERANCE)


def normalized(batch: Vector, mean: Vector, var: Vector, state: State) -> Vector:
    wide = batch.astype(np.float64)
    scaled = (wide - mean) / np.sqrt(np.asarray(var, np.float64) + state.config["eps"])
    return scaled * state.tensors["weight"] + state.tensors["bias"]
