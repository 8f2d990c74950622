"""The benchmarks run: every row, once and for a moment. Nothing is said about how fast anything is."""

import importlib
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_every_row_is_measured():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--smoke"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 23, done.stdout  # the head, and every row but those of the peers


def test_the_steps_of_a_call_are_measured():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.steps", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" µs  ") == 9


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="epoll is Linux's")
def test_followers_are_measured():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.followers", "10", "3"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "10 followers, 3 commits" in done.stdout


def may_look_into_other_processes():
    status, scope = Path("/proc/self/status"), Path("/proc/sys/kernel/yama/ptrace_scope")
    if status.exists() and int(re.search(r"^CapEff:\s*(\w+)", status.read_text(), re.MULTILINE)[1], 16) >> 19 & 1:
        return True  # CAP_SYS_PTRACE
    return not scope.exists() or scope.read_text().strip() == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="times are read from Linux's /proc")
@pytest.mark.skipif(not may_look_into_other_processes(), reason="py-spy may not look into other processes here")
def test_a_call_is_profiled():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.profile", "train", "--seconds", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "µs of processor time each" in done.stdout
    assert "train_step (batchnorm_service/engine/normalize.py)" in done.stdout
    assert "all other threads" in done.stdout


def test_shares_of_a_profile(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    profile = importlib.import_module("benchmarks.profile")
    server = "a (x.py:1);run (batchnorm_service/server.py:2)"
    lines = [
        f"{server};f (batchnorm_service/f.py:1) 2",
        f"{server};f (batchnorm_service/f.py:2);g (batchnorm_service/g.py:9);f (batchnorm_service/f.py:3) 1",
        f"{server};h (elsewhere/h.py:1) 1",
        "SqliteThread._round (batchnorm_service/store/sqlite_thread.py:5) 70",
        "SqliteThread._round (batchnorm_service/store/sqlite_thread.py:5);w (batchnorm_service/w.py:1) 4",
    ]
    named = {name: (whole, own) for name, whole, own in profile.shares(lines, main=True)}
    assert named == {
        "run (batchnorm_service/server.py)": (1.0, 0.0),
        "f (batchnorm_service/f.py)": (0.75, 0.75),
        "g (batchnorm_service/g.py)": (0.25, 0.0),
    }
    others = [(name.split()[0], whole, own) for name, whole, own in profile.shares(lines, main=False)]
    assert sorted(others) == [("SqliteThread._round", 1.0, 0.0), ("w", 1.0, 1.0)]


def test_gpu_benchmarks_without_a_gpu_say_so_and_exit_0():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
