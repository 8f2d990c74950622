"""How the process treats its memory once it has started."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Final

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_MOST_FROM_HEAP: Final = 16 << 20
_MOST_KEPT: Final = 32 << 20


def settle_memory() -> None:
    """Treat what the start has made as permanent, and keep freed memory for the next request.

    The garbage collector leaves out 200,000 objects of torch and FastAPI, a pause of 100 ms at each full collection.

    glibc gives a freed buffer of a body back to the system, and the next body takes its pages one by one, each a page
    fault: 250 to 680 per eval of 256x256 numbers in JSON. Here buffers of less than 16 MiB come from the
    heap, which gives back what is free at its top once that is more than 32 MiB; below, memory stays up to the peak
    of what such buffers needed. Larger ones go back at once.
    """
    gc.freeze()
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _MOST_FROM_HEAP)
            mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
