"""Where arithmetic runs: on which device, and on the event loop or in a thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import torch

from batchnorm_client.tensors import Tensor

from ..engine.devices import CPU, device
from ..engine.state import LayerState
from ..engine.tensors import to_torch

P = ParamSpec("P")
R = TypeVar("R")


class Computing:
    """Runs engine functions for calls.

    Args:
        default_device: of layers whose config names none.
        inline_bytes: work on so many bytes or fewer is done at once, on more of them in a thread.
    """

    def __init__(self, default_device: str, inline_bytes: int) -> None:
        self._default_device = default_device
        self._inline_bytes = inline_bytes
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="batchnorm-compute")

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
