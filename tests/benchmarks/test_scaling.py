"""The scaling benchmark runs, and its model says what its docs say. Nothing is said about how fast anything is."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="a process's time is read from Linux's /proc")
def test_everything_is_measured_fitted_and_reckoned():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--smoke"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for head in ("## One layer, one replica", "## One layer, many replicas", "## Fitted", "## 1,000,000 train and"):
        assert head in done.stdout
    assert done.stdout.count("\n| 2 | ") == 4
    for callers in (16, 2):
        assert done.stdout.count(f"\n| 2 | {callers} | ") == 1


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.fleet")


def test_the_model_grows_with_the_load_and_knows_its_limits(model):
    measured = model.Measured(1e-3, 2e-4, 5e-5, 2e-5, 1e-3, 1e-4, 0.2, 150, 2000, 8192)
    small = "\n".join(model.fleet(measured, model.Load(10, 10, 10)))
    large = "\n".join(model.fleet(measured, model.Load()))
    assert "| replica cores | 1 |" in small
    assert "**no**" not in small
    assert "| replica cores | 5,000 |" in large
    assert "**no**" in large
    assert model.layer_rate(measured, 64) > model.layer_rate(measured, 4)
    assert model.layer_rate(measured, 1e9) <= 1 / measured.fold
