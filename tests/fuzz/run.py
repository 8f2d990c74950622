"""`python -m fuzz.run`: fuzz the targets side by side, or replay one input; `make fuzz` calls it.

With atheris, coverage guides what is tried next; without it, inputs are changed at random. What reaches new code is
kept in `.fuzz/corpus`, what breaks a promise in `.fuzz/faults`. A target ends at its first fault.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]
FOUND: Final = ROOT / ".fuzz"
NAMES: Final = (
    "json",
    "npy",
    "safetensors",
    "written",
    "documents",
    "moments",
    "inference",
    "heads",
    "records",
    "urls",
    "tokens",
    "http",
)
"""The targets; importing them here would import torch, in a process that only waits."""

GRACE: Final = 120
"""Seconds after its time at which a process that does not end is killed; it imports torch and ends its last input."""


class Outcome(NamedTuple):
    """What came of a target.

    Attributes:
        name: the target's.
        inputs: how many were tried.
        rate: how many a second.
        new: how many entries its corpus has gained.
        peak: its process's largest resident memory in MiB.
        faults: the files of inputs that broke a promise.
        log: what its process printed.
    """

    name: str
    inputs: int
    rate: int
    new: int
    peak: int
    faults: list[Path]
    log: str


def fuzz(names: list[str], minutes: float, guided: bool, found: Path = FOUND) -> int:
    """Share the time over the targets, on all cores, and print a line for each. Returns the exit status."""
    cores = os.cpu_count() or 1
    seconds = 60 * minutes * min(cores, len(names)) / len(names)
    if not guided:
        print("atheris is not installed: inputs are changed at random, not guided by coverage", flush=True)
    faults = 0
    with ThreadPoolExecutor(cores) as pool:
        for outcome in pool.map(lambda name: _fuzz_one(name, seconds, guided, found), names):
            print(_line(outcome), flush=True)
            for fault in outcome.faults:
                print(_described(outcome, fault), flush=True)
            faults += len(outcome.faults)
    print(f"{len(names)} targets, {faults} faults")
    return 1 if faults else 0


def _line(outcome: Outcome) -> str:
    return (
        f"{outcome.name:12}{outcome.inputs:9} inputs {outcome.rate:7}/s {outcome.new:5} new {outcome.peak:5} MiB"
        f" {len(outcome.faults):2} faults"
    )


def _described(outcome: Outcome, fault: Path) -> str:
    """A fault: the end of what its process printed, without libFuzzer's own lines, and how to replay it."""
    lines = [line for line in outcome.log.splitlines() if not re.match(r"#\d|INFO|MS:|0x|stat::|art|Base64", line)]
    told = "\n".join(f"    {line[:300]}" for line in lines[-14:])
    shown = fault.relative_to(ROOT) if fault.is_relative_to(ROOT) else fault
    return f"{told}\n    {fault.name.partition('-')[0]}: make fuzz TARGET={outcome.name} INPUT={shown}"


def _fuzz_one(name: str, seconds: float, guided: bool, found: Path) -> Outcome:
    corpus, faults = found / "corpus" / name, found / "faults" / name
    for folder in (corpus, faults):
        folder.mkdir(parents=True, exist_ok=True)
    before, known = len(list(corpus.iterdir())), _written(faults)
    module = "fuzz.guided" if guided else "fuzz.unguided"
    command = [sys.executable, "-m", module, name, str(seconds), str(found)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as child:
        try:
            log, _ = child.communicate(timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            log, _ = child.communicate()
    text = log.decode(errors="replace")
    broken = sorted(path for path, _ in _written(faults) - known)
    if child.returncode and not broken:
        broken = [faults / f"process-ended-with-{child.returncode}"]
        broken[0].write_text(text)
    stats = dict(re.findall(r"^stat::(\w+):\s+(\d+)", text, re.MULTILINE))
    keys = ("number_of_executed_units", "average_exec_per_sec", "peak_rss_mb")
    inputs, rate, peak = (int(stats.get(key, 0)) for key in keys)
    return Outcome(name, inputs, rate, len(list(corpus.iterdir())) - before, peak, broken, text)


def _written(folder: Path) -> set[tuple[Path, int]]:
    """Files, and when they were written: a fault that is found again is written again."""
    return {(path, path.stat().st_mtime_ns) for path in folder.iterdir()}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for all targets together")
    parser.add_argument("--target", choices=NAMES, help="only this one")
    parser.add_argument("--input", type=Path, help="replay this file with the target")
    parser.add_argument("--unguided", action="store_true", help="as if atheris were not installed")
    asked = parser.parse_args()
    if asked.input:
        if not asked.target:
            parser.error("--input needs --target")
        return subprocess.call([sys.executable, "-m", "fuzz.unguided", asked.target, str(asked.input)])
    guided = not asked.unguided and importlib.util.find_spec("atheris") is not None
    return fuzz([asked.target] if asked.target else list(NAMES), asked.minutes, guided)


if __name__ == "__main__":
    sys.exit(main())
