"""The examples, in short: each keeps what it promises, and draws its picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("script", "short", "promise"),
    [
        ("federated", ["--images", "400"], "The service's variance is the centralized one within 1e-12."),
        ("reinforcement", ["--rollouts", "5"], "The actors share one state."),
        ("synchronized", ["--steps", "4"], "The losses are equal within 0.0001."),
    ],
)
def test_an_example(script, short, promise, tmp_path):
    picture = tmp_path / "picture.png"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATCHNORM_")}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py", *short, "--plot", picture],
        env=kept | {"PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert promise in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 100_000
    if script == "synchronized":
        assert "ValueError: SyncBatchNorm expected input tensor to be on GPU" in done.stdout


@pytest.mark.parametrize("target", ["demo", "example-digits", "examples"])
def test_the_examples_write_no_tracked_file_unless_asked(target):
    """`make pictures` draws those in docs/."""
    for name, drawn in ((target, False), ("pictures", True)):
        command = ["make", "--dry-run", "--assume-old=.venv/dev.stamp", name]
        done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=True)
        assert "examples/" in done.stdout
        assert ("--plot" in done.stdout) == drawn
