"""Between the CPU and a CUDA device: through pinned memory, on a stream of the thread's own, with one wait for a call.

Only a copy from or to pinned (page-locked) memory leaves the thread free to queue what comes next; with ordinary memory
each copy waits for the device. So a call queues its uploads, its kernels and its downloads, and then waits once. See
"Asynchronous execution" and "Use pinned memory buffers" in torch's notes on CUDA semantics.

A stream and its buffer belong to one thread, and a thread does one call at a time: no two calls can meet in a buffer,
and no lock is needed. All that a call allocates on the device is used on its stream only, which is what torch's caching
allocator takes for granted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_LEAST: Final = 1 << 20
_MOST: Final = 128 << 20  # a body of the default limit (64 MiB), its layer's vectors, and rounding to a power of two
_ALIGNMENT: Final = 256  # bytes, as the caching allocator's: what the copy engine and vectorized loads like


class Queue(Protocol):
    """What does the copies, in order."""

    def pinned(self, nbytes: int) -> Tensor:
        """New memory that `copy` reads and writes without waiting, (nbytes,) uint8."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy; one of both is pinned, both are (n,) uint8."""
        ...

    def wait(self) -> None:
        """Return when all that was queued is done."""
        ...


class CudaQueue:
    """The current stream of a device.

    Attributes:
        stream: one that nobody else uses; current within `staged`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, nbytes: int) -> Tensor:
        """See `Queue`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Queue`."""
        target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """See `Queue`. Other threads run meanwhile: torch lets go of the GIL."""
        torch.cuda.current_stream(self._device).synchronize()


class Staging:
    """A pinned buffer that grows to what calls need, up to `most` bytes. Of one thread.

    What a call uploads is placed side by side, because the device reads it later. What it downloads is placed over
    that: the queue is in order, so the uploads have been read before. A call that needs more than `most` bytes goes
    through in pieces, with one more wait each time that the buffer is full.

    Args:
        queue: does the copies.
        most: bytes of pinned memory.
    """

    def __init__(self, queue: Queue, most: int = _MOST) -> None:
        self._queue = queue
        self._most = most
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._outgrown: list[Tensor] = []  # buffers that the device may still be reading
        self._arriving: list[tuple[Tensor, Tensor]] = []  # where to, and the part of the buffer that it comes to

    def upload(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A contiguous copy on the device. It has not arrived yet: what is queued after it will find it there.

        Args:
            tensor: on the CPU, of any shape. It is read before this returns, and may be changed afterwards.
            device: where the copy shall be.
        """
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        source, target = _bytes(tensor.contiguous()), _bytes(there)
        self._reserve(len(source))
        for begin, end, staged in self._places(len(source)):
            staged.copy_(source[begin:end])
            self._queue.copy(target[begin:end], staged)
        return there

    def download(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Copies in ordinary memory on the CPU, with the same strides where those leave no gaps. Waits.

        In ordinary memory, because an answer may wait long for its commit and for a slow client, and pinned memory is
        everybody's.
        """
        kept = tuple(torch.empty_like(tensor, device="cpu") for tensor in tensors)
        self._used = 0
        self._reserve(sum(_aligned(tensor.nbytes) for tensor in tensors))
        for tensor, here in zip(tensors, kept, strict=True):
            dense = tensor if tensor.stride() == here.stride() else torch.empty_like(tensor).copy_(tensor)
            source, target = _bytes(dense), _bytes(here)
            for begin, end, staged in self._places(len(source)):
                self._queue.copy(staged, source[begin:end])
                self._arriving.append((target[begin:end], staged))
        self._wait()
        return kept

    def settle(self) -> None:
        """Wait for what a call has queued and not waited for, as when it failed: the next one writes over it."""
        if self._used or self._arriving:
            self._wait()

    def _wait(self) -> None:
        arriving, self._arriving = self._arriving, []
        self._queue.wait()
        self._used = 0
        self._outgrown.clear()
        for target, staged in arriving:
            target.copy_(staged)

    def _reserve(self, nbytes: int) -> None:
        """Make room, if that is allowed."""
        size = len(self._buffer)
        if self._used + nbytes > size and size < self._most:
            self._outgrown.append(self._buffer)
            size = max(_LEAST, 1 << (self._used + nbytes - 1).bit_length())  # to what torch rounds it up anyway
            self._buffer, self._used = self._queue.pinned(min(size, self._most)), 0

    def _places(self, nbytes: int) -> Iterator[tuple[int, int, Tensor]]:
        """Begin and end of each piece of so many bytes, and the part of the buffer that it goes through."""
        begin = 0
        while begin < nbytes:
            if self._used >= len(self._buffer):
                self._wait()
            end = min(nbytes, begin + len(self._buffer) - self._used)
            place = self._buffer[self._used : self._used + end - begin]
            self._used = _aligned(self._used + end - begin)
            yield begin, end, place
            begin = end


class _Own(threading.local):
    """What this thread has for each device."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, tuple[CudaQueue, Staging]] = {}


_own: Final = _Own()


def staging(device: torch.device) -> Staging:
    """This thread's for the device. It queues on the current stream."""
    return _of_this_thread(device)[1]


def staged(device: torch.device, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What the function gives, computed on a CUDA device, on this thread's stream.

    Args:
        device: with or without an index.
        function: one of the engine's, which give their results on the CPU.
        args: its arguments. The tensors among them are batches and are copied to the device, but for those that are
            empty: there is nothing to compute.
        kwargs: passed on.
    """
    device = torch.device(device.type, device.index or 0)
    queue, own = _of_this_thread(device)
    with torch.cuda.stream(queue.stream):
        try:
            there = [own.upload(arg, device) if isinstance(arg, Tensor) and arg.numel() else arg for arg in args]
            return function(*there, **kwargs)  # type: ignore[arg-type]  # a tensor for a tensor
        finally:
            own.settle()


def _of_this_thread(device: torch.device) -> tuple[CudaQueue, Staging]:
    found = _own.by_device.get(device)
    if found is None:
        queue = CudaQueue(device)
        found = _own.by_device[device] = queue, Staging(queue)
    return found


def _bytes(dense: Tensor) -> Tensor:
    """The memory of a tensor whose elements leave no gaps, in the order in which it lies there: a view."""
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
