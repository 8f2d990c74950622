"""Runs arithmetic and codecs on the event loop or in a thread, and on the layer's device."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from typing import Final, ParamSpec, TypeVar

import torch

from batchnorm_client.wire.tensors import Tensor

from ..engine.devices import device
from ..engine.staging import staged
from ..engine.state import LayerState
from ..engine.tensors import to_torch
from ..runtime import Runtime
from ..telemetry import CURRENT_SPAN
from .fair_pool import FairPool
from .records import CommittedLayer

P = ParamSpec("P")
R = TypeVar("R")


_LOWEST_PRIORITY: Final = 19

_DEVICE_THREADS: Final = 4
"""How many calls use devices at once: most devices can upload, compute and download in parallel, and a fourth call uses
the CPU meanwhile. Each thread has its own stream and pinned memory (`engine.staging`): more would cost memory."""


def _lower_priority() -> None:
    """Lower the thread's priority, so that on few cores the event loop and its small calls run before large batches.

    On one core, p99 of evals of 8 KiB beside 8 MiB train batches was 8 to 9 ms without this, 3 ms with it (one run).
    """
    if sys.platform == "linux":  # only Linux has a niceness per thread
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


class ComputeExecutor:
    """Thread pools for engine functions and codecs.

    Args:
        default_device: the device of layers whose config names none.
        inline_bytes: work on up to this many bytes runs on the event loop, on more in a thread. Work on another device
            than the CPU always runs in a thread, because it blocks until the device is done, and at first for CUDA's
            initialization.
        traced: whether decoding, arithmetic and encoding are stages of the trace of a request that is sampled.
    """

    def __init__(self, default_device: str, inline_bytes: int, runtime: Runtime, *, traced: bool = False) -> None:
        self._traced = False
        self._default_device = default_device
        self._inline_bytes = inline_bytes
        cores = os.cpu_count() or 1

        def pool(threads: int, name: str, start: Callable[[], None] | None = None) -> FairPool:
            return FairPool(ThreadPoolExecutor(threads, name, start), threads, runtime)

        self._pool = pool(cores, "batchnorm-compute", _lower_priority)
        self._device_pool = pool(_DEVICE_THREADS, "batchnorm-device", _lower_priority)
        self._codec_pool = pool(cores, "batchnorm-codec")
        self._untraced = copy.copy(self)  # a call more for each stage would cost a small eval half a percent
        self._traced = traced

    def device(self, name: str | None) -> torch.device:
        """The device of a config. Raises `DeviceUnavailable`."""
        return device(name or self._default_device)

    def off_cpu(self, state: LayerState) -> bool:
        """Whether the layer computes on another device than the CPU."""
        return (state.config.device or self._default_device) != "cpu"

    def batch(self, state: LayerState, tensor: Tensor) -> torch.Tensor:
        """A caller's tensor, on the CPU; `run` copies it to the layer's device. Raises `DeviceUnavailable`."""
        if self.off_cpu(state):
            self.device(state.config.device)
        return to_torch(tensor)

    def runs_inline(self, nbytes: int) -> bool:
        """Whether work on this many bytes, for a layer that is not `off_cpu`, runs on the event loop."""
        return nbytes <= self._inline_bytes

    async def run(self, nbytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call an engine function: directly for small work, in a thread for large work (torch releases the GIL).

        If the first argument is the state of a layer that is `off_cpu`, the tensors are copied to its device, and the
        function runs there.
        """
        if self._traced and (request := CURRENT_SPAN.get()) is not None:
            with request.child("normalize"):
                return await self._untraced.run(nbytes, function, *args, **kwargs)
        state = args[0] if args else None
        if isinstance(state, LayerState) and self.off_cpu(state):
            on_device = partial(staged, self.device(state.config.device), function, *args, **kwargs)
            return await self._device_pool.run(on_device)
        if self.runs_inline(nbytes):
            return function(*args, **kwargs)
        return await self._pool.run(function, *args, **kwargs)

    async def run_codec(self, nbytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a codec: directly for small work, in a thread for large work.

        Unlike torch, a codec often holds the GIL. So these threads keep the normal priority: a preempted thread that
        holds the GIL would block the event loop.
        """
        if self.runs_inline(nbytes):
            return function(*args, **kwargs)
        return await self._codec_pool.run(function, *args, **kwargs)

    async def decode(self, nbytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Read a request by a codec."""
        if self._traced and (request := CURRENT_SPAN.get()) is not None:
            with request.child("decode"):
                return await self._untraced.decode(nbytes, function, *args, **kwargs)
        if self.runs_inline(nbytes):
            return function(*args, **kwargs)
        return await self._codec_pool.run(function, *args, **kwargs)

    async def encode(self, nbytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Write a response by a codec."""
        if self._traced and (request := CURRENT_SPAN.get()) is not None:
            with request.child("encode"):
                return await self._untraced.encode(nbytes, function, *args, **kwargs)
        if self.runs_inline(nbytes):
            return function(*args, **kwargs)
        return await self._codec_pool.run(function, *args, **kwargs)

    async def digest(self, layer: CommittedLayer) -> str:
        """The digest of a layer's state; of one with many channels, it is computed in a thread."""
        nbytes = 4 * 8 * layer.state.config.num_features  # at most four vectors of float64
        return layer.digest if self.runs_inline(nbytes) else await self.run_codec(nbytes, attrgetter("digest"), layer)

    def close(self) -> None:
        """Stop the threads."""
        self._codec_pool.shutdown()
        self._pool.shutdown()
        self._device_pool.shutdown()
