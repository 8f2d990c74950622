"""The limits that every input has to keep: time and memory."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Final

SECONDS: Final = 10
"""That an input may take; a longer one is a hang."""

GROWTH: Final = 256
"""MiB by which an input may raise the peak of resident memory: the largest layer takes 4 MiB for each tensor."""

MEBIBYTES: Final = 1024
"""Resident memory of the process; importing takes some 250."""


class HangError(BaseException):
    """An input takes too long. Not an `Exception`: the service would answer with 500."""


class TooMuchMemoryError(Exception):
    """An input uses too much memory."""


def peak() -> int:
    """The peak of this process's resident memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def file_name(data: bytes) -> str:
    """The name of an input's file, which libFuzzer gives it too."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def limited(promise: Callable[[bytes], None], faults: Path | None = None) -> Callable[[bytes], None]:
    """A target that also promises not to use much memory. An empty input says nothing.

    Args:
        promise: the target's.
        faults: the folder where inputs that break it are kept.
    """

    def run(data: bytes) -> None:
        before = peak()
        try:
            if data:
                promise(data)
            if (grown := peak() - before) > GROWTH:
                raise TooMuchMemoryError(f"{len(data)} bytes raised the memory by {grown} MiB")
        except (Exception, HangError) as error:
            kind = {HangError: "timeout", TooMuchMemoryError: "oom"}.get(type(error), "crash")
            if faults is not None:
                (faults / f"{kind}-{file_name(data)}").write_bytes(data)
            raise

    return run
