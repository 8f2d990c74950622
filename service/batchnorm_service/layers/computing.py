"""Where arithmetic runs: on which device, and on the event loop or in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, ParamSpec, TypeVar

import torch

from batchnorm_client.tensors import Tensor

from ..engine.devices import CPU, device
from ..engine.state import LayerState
from ..engine.tensors import to_torch

P = ParamSpec("P")
R = TypeVar("R")


_NICEST: Final = 19


def _let_others_go_first() -> None:
    """Where cores are few, a large batch waits for the event loop, which answers small calls, and not the other way.

    On one core, p99 of evals of 8 KiB beside 8 MiB train batches was 8 to 9 ms without this, 3 ms with it (one run).
    """
    if sys.platform == "linux":  # elsewhere a thread has no niceness of its own
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)


class Computing:
    """Runs engine functions for calls.

    Args:
        default_device: of layers whose config names none.
        inline_bytes: work on so many bytes or fewer is done at once, on more of them in a thread.
    """

    def __init__(self, default_device: str, inline_bytes: int) -> None:
        self._default_device = default_device
        self._inline_bytes = inline_bytes
        self._pool = ThreadPoolExecutor(os.cpu_count(), "batchnorm-compute", _let_others_go_first)

    def device(self, name: str | None) -> torch.device:
        """The device of a config. Raises `DeviceUnavailable`."""
        return device(name or self._default_device)

    def batch(self, state: LayerState, tensor: Tensor) -> torch.Tensor:
        """A caller's tensor where its layer lives."""
        there = self.device(state.config.device)
        return to_torch(tensor) if there == CPU else to_torch(tensor).to(there)

    def at_once(self, nbytes: int) -> bool:
        """Whether work on so many bytes is done without waiting for a thread."""
        return nbytes <= self._inline_bytes

    async def run(self, nbytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Small work at once, large work in a thread (torch lets go of the GIL) so that other calls go on."""
        if self.at_once(nbytes):
            return function(*args, **kwargs)
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown()
