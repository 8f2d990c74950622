"""`python -m soak.run`: mixed load on a real service for a while; `make soak` calls it.

Exit status 1 if an answer or an account is wrong, if descriptors are left open, or if memory grows: if the 95%
confidence interval of its slope is above zero.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from service.conftest import Process
from soak.load import RECEIPT_SECONDS, Load
from soak.trend import Trend, trend

MEBIBYTE: Final = 1 << 20
CALLERS: Final = 4
_IDLE_SECONDS: Final = 60.0
_WARM_UP: Final = 1 / 2
"""Part of the time that is not measured, with twice the callers: caches fill, and the heap gets as large as it may.

What history listings remember is the last to be full, after 2,000 states: with a third of 30 minutes, memory still grew
by 0.2 MiB in the first ten minutes that were measured, and not at all in the last ten.
"""


class Report(NamedTuple):
    """What was measured.

    Attributes:
        done: how often each kind of request was made.
        seconds: the time of each sample since the warm-up.
        memory: resident bytes at that time.
        descriptors: open file descriptors at that time.
        idle: open descriptors without a caller, before and after.
    """

    done: Counter[str]
    seconds: np.ndarray
    memory: np.ndarray
    descriptors: np.ndarray
    idle: tuple[int, int]

    @property
    def growth(self) -> Trend:
        """Bytes per second."""
        return trend(self.seconds, self.memory)


def soak(seconds: float, directory: Path, *, samples: int = 600) -> Report:
    """Put a service with an SQLite store under load. Raises AssertionError if an answer or an account is wrong."""
    variables = {"BATCHNORM_RECEIPT_SECONDS": f"{RECEIPT_SECONDS:g}", "BATCHNORM_HISTORY_SECONDS": "1"}
    service = Process("--store", f"sqlite:///{directory}/layers.db", **variables)
    try:
        assert service.url, service.output
        process = Path(f"/proc/{service.process.pid}")
        warm_up = Load(service.url, 2 * CALLERS)
        warm_up.start()
        time.sleep(_WARM_UP * seconds)
        warm_up.stop()
        before = _idle(process)
        load, begin, found = Load(service.url, CALLERS), time.monotonic(), []
        load.start()
        while (now := time.monotonic() - begin) < (1 - _WARM_UP) * seconds and not load.failed:
            found.append((now, _resident(process), _descriptors(process)))
            time.sleep(seconds / samples)
        done = load.stop()
        after = _idle(process, before)
        assert service.stop() == 0, service.output
        assert "Traceback" not in service.output, service.output
    finally:
        service.close()
    moments, memory, descriptors = np.array(found).T
    return Report(done, moments, memory, descriptors, (before, after))


def _resident(process: Path) -> int:
    (line,) = (line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _descriptors(process: Path) -> int:
    return len(list((process / "fd").iterdir()))


def _idle(process: Path, expected: int | None = None) -> int:
    """Open descriptors once that many are left, or no longer change."""
    deadline, last = time.monotonic() + _IDLE_SECONDS, -1
    while (now := _descriptors(process)) != (last if expected is None else expected) and time.monotonic() < deadline:
        last = now
        time.sleep(1)
    return now


def _print(report: Report) -> None:
    growth = report.growth
    hour = 3600 / MEBIBYTE
    print(f"{sum(report.done.values()):,} requests; every acknowledged fold is there once")
    print("  " + ", ".join(f"{kind} {number:,}" for kind, number in sorted(report.done.items())))
    print(
        f"resident memory: {report.memory.min() / MEBIBYTE:.1f} to {report.memory.max() / MEBIBYTE:.1f} MiB,"
        f" slope {growth.slope * hour:+.1f} MiB/h, 95% interval {growth.low * hour:+.1f} to {growth.high * hour:+.1f}"
    )
    print(
        f"file descriptors: {report.idle[0]} before, {report.idle[1]} after,"
        f" {report.descriptors.min():.0f} to {report.descriptors.max():.0f} under load"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    torch.set_num_threads(1)  # as the service does: torch rounds sums in an order that depends on it
    seconds = 60 * parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as directory:
        report = soak(seconds, Path(directory))
    _print(report)
    if report.growth.grows:
        print("memory grows")
    if report.idle[0] != report.idle[1]:
        print("descriptors were left open")
    return int(report.growth.grows or report.idle[0] != report.idle[1])


if __name__ == "__main__":
    sys.exit(main())
