"""The soak in short, and the estimate of its slope."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from soak.run import MEBIBYTE, soak
from soak.trend import trend


def noise(seed: int, length: int = 600) -> np.ndarray:
    """Strongly autocorrelated: an AR(1) process that forgets in 20 samples."""
    shocks = np.random.default_rng(seed).normal(size=length)
    values = np.empty(length)
    last = 0.0
    for index, shock in enumerate(shocks):
        values[index] = last = 0.95 * last + shock
    return values


def test_the_interval_holds_the_slope_as_often_as_it_says() -> None:
    """An interval from the samples themselves, as if they were independent, would hold it in a quarter of the cases."""
    seconds = np.arange(600.0)
    slopes = [0.0, 0.02]
    for slope in slopes:
        found = [trend(seconds, slope * seconds + noise(seed)) for seed in range(300)]
        held = sum(each.low <= slope <= each.high for each in found)
        assert held >= 0.88 * len(found)


def test_a_leak_is_seen() -> None:
    seconds = np.arange(600.0)
    assert all(trend(seconds, 0.1 * seconds + noise(seed)).grows for seed in range(50))
    assert not trend(seconds, -0.1 * seconds + noise(0)).grows


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory and descriptors are read from /proc")
def test_a_short_soak(tmp_path: Path) -> None:
    report = soak(15, tmp_path, samples=60)
    assert report.idle[0] == report.idle[1], "descriptors were left open"
    kinds = {"train", "evaluate", "moments", "many", "repeat", "large", "refused", "abandoned", "pin", "roll back"}
    assert {*report.done} >= kinds
    assert report.memory.max() - report.memory.min() < 200 * MEBIBYTE
