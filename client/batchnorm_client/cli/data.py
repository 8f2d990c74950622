"""Arrays in .npy files, read and written batch by batch, so that neither is in memory as a whole."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from batchnorm_client.cli.service import USAGE, fail

Array = npt.NDArray[Any]


class Batches:
    """The rows of an array in batches; the file is memory-mapped.

    Args:
        path: a .npy file.
        size: rows in a batch.
        dtype: each batch is converted to it before it is sent; None for no conversion.
        whole: omit the last rows if they do not fill a batch.
    """

    def __init__(self, path: Path, size: int, dtype: str | None = None, *, whole: bool = False) -> None:
        self.path = path
        self.array = _mapped(path)
        rows = len(self.array)
        self.rows = rows - rows % size if whole else rows
        self.dtype = np.dtype(dtype) if dtype else self.array.dtype
        self._size = size

    def __len__(self) -> int:
        return len(range(0, self.rows, self._size))

    def __iter__(self) -> Iterator[tuple[slice, Array]]:
        for start in range(0, self.rows, self._size):
            place = slice(start, min(start + self._size, self.rows))
            yield place, self.array[place].astype(self.dtype, copy=False)


def _mapped(path: Path) -> Array:
    try:
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                fail(f"{path}: not a .npy file", USAGE)
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        fail(f"{path}: {error.strerror or error}", USAGE)
    except ValueError as error:
        fail(f"{path}: not a .npy file that can be mapped: {error}", USAGE)
    if array.ndim < 2:
        fail(f"{path}: an array of shape {array.shape} is not a batch; it needs at least two dimensions, (N, C)", USAGE)
    return array


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder. It replaces `path` on success, and is deleted on failure."""
    if path.is_dir():
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.filename and os.fspath(error.filename) == str(part):
            error.filename = str(path)  # the path that the user gave
        raise
    finally:
        part.unlink(missing_ok=True)


_WIDE = 60
"""Narrower terminals show the bar and the count only."""


class _Rate(ProgressColumn):
    """Samples per second."""

    def render(self, task: Task) -> Text:
        samples = task.fields["samples"]
        rate = samples / task.elapsed if task.elapsed else 0
        return Text(f"{rate:,.0f}/s", "cyan")


@contextmanager
def progress(label: str, total: int) -> Iterator[Any]:
    """A progress bar on stderr, if that is a terminal. Yields a function to call with the samples done so far."""
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()]
    if console.width >= _WIDE:
        columns += [_Rate(), TimeRemainingColumn(compact=True)]
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=total, samples=0)

        def advance(samples: int) -> None:
            bar.update(task, advance=1, samples=samples)

        yield advance
