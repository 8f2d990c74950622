"""Where arithmetic and codecs run: on which device, and on the event loop or in a thread."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, ParamSpec, TypeVar

import torch

from batchnorm_client.wire.tensors import Tensor

from ..engine.devices import device
from ..engine.staging import staged
from ..engine.state import LayerState
from ..engine.tensors import to_torch
from ..runtime import Runtime

P = ParamSpec("P")
R = TypeVar("R")


_NICEST: Final = 19

_DEVICE_THREADS: Final = 4
"""How many calls are on devices at once. While one is uploaded, another computes and a third comes back: most devices
have an engine for each; the fourth is for what the CPU does in between. Each has a stream and pinned memory of its own
(`engine.staging`), so that more of them would hold more."""


def _let_others_go_first() -> None:
    """Where cores are few, a large batch waits for the event loop, which answers small calls, and not the other way.

    On one core, p99 of evals of 8 KiB beside 8 MiB train batches was 8 to 9 ms without this, 3 ms with it (one run).
    """
    if sys.platform == "linux":  # elsewhere a thread has no niceness of its own
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)


class ComputeExecutor:
    """Runs engine functions and codecs for calls.

    Args:
        default_device: of layers whose config names none.
        inline_bytes: work on so many bytes or fewer is done at once, on more of them in a thread. Work on another
            device is always done in a thread: it waits for the device, and the first time for all that CUDA sets up,
            which the event loop must not.
    """

    def __init__(self, default_device: str, inline_bytes: int, runtime: Runtime) -> None:
        self._runtime = runtime
        self._default_device = default_device
        self._inline_bytes = inline_bytes
        self._pool = ThreadPoolExecutor(os.cpu_count(), "batchnorm-compute", _let_others_go_first)
        self._device_pool = ThreadPoolExecutor(_DEVICE_THREADS, "batchnorm-device", _let_others_go_first)
        self._codec_pool = ThreadPoolExecutor(os.cpu_count(), "batchnorm-codec")

    def device(self, name: str | None) -> torch.device:
        """The device of a config. Raises `DeviceUnavailable`."""
        return device(name or self._default_device)

    def away(self, state: LayerState) -> bool:
        """Whether the layer lives on another device than the CPU."""
        return (state.config.device or self._default_device) != "cpu"

    def batch(self, state: LayerState, tensor: Tensor) -> torch.Tensor:
        """A caller's tensor, on the CPU: `run` takes it to where its layer lives. Raises `DeviceUnavailable`."""
        if self.away(state):
            self.device(state.config.device)
        return to_torch(tensor)

    def at_once(self, nbytes: int) -> bool:
        """Whether work on so many bytes is done without waiting for a thread, for a layer that is not `away`."""
        return nbytes <= self._inline_bytes

    async def run(self, nbytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Small work at once, large work in a thread (torch lets go of the GIL) so that other calls go on.

        A function whose first argument is the state of a layer that is `away` runs on that layer's device, and its
        tensors are taken there.
        """
        state = args[0] if args else None
        if isinstance(state, LayerState) and self.away(state):
            there = partial(staged, self.device(state.config.device), function, *args, **kwargs)
            return await self._runtime.in_thread(self._device_pool, there)
        if self.at_once(nbytes):
            return function(*args, **kwargs)
        return await self._runtime.in_thread(self._pool, function, *args, **kwargs)

    async def run_codec(self, nbytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Decode or encode: little at once, and much in a thread, so that other calls go on.

        Unlike torch, a codec often holds the GIL. So these threads are as important as the event loop's: a thread that
        other processes keep from running while it holds the GIL would keep the event loop from running, too.
        """
        if self.at_once(nbytes):
            return function(*args, **kwargs)
        return await self._runtime.in_thread(self._codec_pool, function, *args, **kwargs)

    def close(self) -> None:
        """Let go of the threads."""
        self._codec_pool.shutdown()
        self._pool.shutdown()
        self._device_pool.shutdown()
