"""Copies between the CPU and a CUDA device, through pinned memory, on one stream per thread.

Only copies from or to pinned (page-locked) memory are asynchronous; with pageable memory each copy waits for the
device. So a call queues its uploads, kernels and downloads, and then waits once. See "Asynchronous execution" and "Use
pinned memory buffers" in torch's notes on CUDA semantics.

Each thread has its own stream and buffer and does one call at a time, so no locks are needed. Everything that a call
allocates on the device is used on its stream only, as torch's caching allocator requires.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_MIN_BUFFER: Final = 1 << 20
_MAX_BUFFER: Final = 128 << 20  # the default body limit (64 MiB) plus the layer's vectors, rounded to a power of two
_ALIGNMENT: Final = 256  # bytes; like the caching allocator's


class CopyQueue(Protocol):
    """A queue of copies, executed in order."""

    def pinned(self, nbytes: int) -> Tensor:
        """Allocate pinned memory, (nbytes,) uint8."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy between two (n,) uint8 tensors, one of which is pinned."""
        ...

    def wait(self) -> None:
        """Return when all queued work is done."""
        ...


class CudaQueue:
    """A `CopyQueue` on the current stream of a CUDA device.

    Attributes:
        stream: the stream of one thread; current within `staged`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, nbytes: int) -> Tensor:
        """See `CopyQueue`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `CopyQueue`."""
        target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """See `CopyQueue`. torch releases the GIL meanwhile."""
        torch.cuda.current_stream(self._device).synchronize()


class Staging:
    """A thread's pinned buffer, which grows as needed up to `max_bytes`.

    Uploads are placed side by side, because the device reads them later. Downloads overwrite them: the queue is in
    order, so the uploads have been read by then. A call that needs more than `max_bytes` is copied in chunks, with one
    more wait each time the buffer is full.

    Args:
        queue: executes the copies.
        max_bytes: maximum size of the pinned buffer.
    """

    def __init__(self, queue: CopyQueue, max_bytes: int = _MAX_BUFFER) -> None:
        self._queue = queue
        self._max_bytes = max_bytes
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._outgrown: list[Tensor] = []  # buffers that the device may still be reading
        self._downloads: list[tuple[Tensor, Tensor]] = []  # target, and the part of the buffer to copy from

    def upload(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Queue a copy to the device; the result is contiguous, and usable by work that is queued after it.

        Args:
            tensor: on the CPU, of any shape. It is read before this returns, and may be changed afterwards.
            device: the target device.
        """
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        source, target = _bytes(tensor.contiguous()), _bytes(there)
        self._reserve(len(source))
        for begin, end, staged in self._chunks(len(source)):
            staged.copy_(source[begin:end])
            self._queue.copy(target[begin:end], staged)
        return there

    def download(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Copy to pageable memory on the CPU, with the same strides if they leave no gaps, and wait.

        The results are not in pinned memory, which is scarce: a response may wait long for its commit and its client.
        """
        kept = tuple(torch.empty_like(tensor, device="cpu") for tensor in tensors)
        self._used = 0
        self._reserve(sum(_aligned(tensor.nbytes) for tensor in tensors))
        for tensor, here in zip(tensors, kept, strict=True):
            dense = tensor if tensor.stride() == here.stride() else torch.empty_like(tensor).copy_(tensor)
            source, target = _bytes(dense), _bytes(here)
            for begin, end, staged in self._chunks(len(source)):
                self._queue.copy(staged, source[begin:end])
                self._downloads.append((target[begin:end], staged))
        self._wait()
        return kept

    def settle(self) -> None:
        """Wait for queued copies of a failed call, before the next call overwrites the buffer."""
        if self._used or self._downloads:
            self._wait()

    def _wait(self) -> None:
        downloads, self._downloads = self._downloads, []
        self._queue.wait()
        self._used = 0
        self._outgrown.clear()
        for target, staged in downloads:
            target.copy_(staged)

    def _reserve(self, nbytes: int) -> None:
        """Grow the buffer if it is too small and below its maximum."""
        size = len(self._buffer)
        if self._used + nbytes > size and size < self._max_bytes:
            self._outgrown.append(self._buffer)
            size = max(_MIN_BUFFER, 1 << (self._used + nbytes - 1).bit_length())  # as torch rounds it
            self._buffer, self._used = self._queue.pinned(min(size, self._max_bytes)), 0

    def _chunks(self, nbytes: int) -> Iterator[tuple[int, int, Tensor]]:
        """Split `nbytes` into chunks: begin and end of each, and the part of the buffer that it is copied through."""
        begin = 0
        while begin < nbytes:
            if self._used >= len(self._buffer):
                self._wait()
            end = min(nbytes, begin + len(self._buffer) - self._used)
            staged = self._buffer[self._used : self._used + end - begin]
            self._used = _aligned(self._used + end - begin)
            yield begin, end, staged
            begin = end


class _ThreadStaging(threading.local):
    """The queue and buffer of the current thread, by device."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, tuple[CudaQueue, Staging]] = {}


_thread_staging: Final = _ThreadStaging()


def staging(device: torch.device) -> Staging:
    """The current thread's buffer for the device, on the current stream."""
    return _of_this_thread(device)[1]


def staged(device: torch.device, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call an engine function on a CUDA device, on the current thread's stream.

    Args:
        device: with or without an index.
        function: a function of the engine, which returns its results on the CPU.
        args: its arguments. Tensors among them are batches and are copied to the device, except empty ones.
        kwargs: its keyword arguments, unchanged.
    """
    device = torch.device(device.type, device.index or 0)
    queue, own = _of_this_thread(device)
    with torch.cuda.stream(queue.stream):
        try:
            on_device = [own.upload(arg, device) if isinstance(arg, Tensor) and arg.numel() else arg for arg in args]
            return function(*on_device, **kwargs)  # type: ignore[arg-type]  # a tensor for a tensor
        finally:
            own.settle()


def _of_this_thread(device: torch.device) -> tuple[CudaQueue, Staging]:
    found = _thread_staging.by_device.get(device)
    if found is None:
        queue = CudaQueue(device)
        found = _thread_staging.by_device[device] = queue, Staging(queue)
    return found


def _bytes(dense: Tensor) -> Tensor:
    """A view of the memory of a tensor without gaps, (nbytes,) uint8, in memory order."""
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
