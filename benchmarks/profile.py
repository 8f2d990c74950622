"""`python -m benchmarks.profile train`: where a call's processor time goes, by thread and by function.

The time per call and thread is the system's own account (/proc), with nothing attached; the functions' shares are
py-spy's samples of a second run, which they slow down. So the shares are rough, and the time per call is not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from benchmarks import cores
from benchmarks.bench import QUICK, Bench
from benchmarks.bodies import KIB, call, json_call, safetensors, square
from benchmarks.load import Call, background, drive
from benchmarks.process import Server
from benchmarks.rows.binary import over_layers

_LEAST: Final = 0.015
_MAIN: Final = "run (batchnorm_service/server.py)"
_OURS: Final = ("batchnorm_", "uvicorn/", "asyncio/runners.py", "numpy/")
_WAITING: Final = "SqliteThread._round ("  # as the last frame: for work


LOADS: Final[dict[str, Callable[[Bench], Call]]] = {
    "eval": lambda bench: Call(bench.service.port, [call(bench.layer("one"), "eval", safetensors(8 * KIB))], 8),
    "train": lambda bench: Call(bench.service.port, [call(bench.layer("one"), "train", safetensors(8 * KIB))], 32),
    "layers": over_layers,
    "json": lambda bench: Call(bench.service.port, [json_call(bench.layer("square", 256), square())], 4),
}
"""As in the rows of the same names."""


def measure(server: Server, load: Call, seconds: float) -> tuple[float, float, float]:
    """Answers per second, and microseconds of processor time per answer: of the event loop's thread, of all others."""
    before = server.used(main_thread=True), server.used()
    done = drive(load, seconds)
    main, whole = server.used(main_thread=True) - before[0], server.used() - before[1]
    each = 1e6 / len(done.latencies)
    return done.rate, main * each, (whole - main) * each


def sample(server: Server, load: Call, seconds: float) -> list[str]:
    """py-spy's samples under that load, a line each: the frames from the outermost in, and a count."""
    with tempfile.TemporaryDirectory() as directory, background(load):
        file = Path(directory) / "samples"
        tool = str(Path(sys.executable).with_name("py-spy"))
        options = ["--format", "raw", "--rate", "100", "--duration", str(round(seconds))]
        command = [tool, "record", *options, "--output", str(file), "--pid", str(server.process.pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"py-spy: {done.stderr.strip()[-500:]}")
        return file.read_text().splitlines()


def shares(lines: Iterable[str], *, main: bool) -> list[tuple[str, float, float]]:
    """Functions of the event loop's thread, or of the others: name, share with what they call, share of their own."""
    whole: Counter[str] = Counter()
    own: Counter[str] = Counter()
    total = 0
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = [frame.rpartition(":")[0] + ")" for frame in stack.split(";")]  # without the line
        if any(frame == _MAIN for frame in frames) != main or frames[-1].startswith(_WAITING):
            continue
        total += int(count)
        whole.update(dict.fromkeys(frames, int(count)))
        own[frames[-1]] += int(count)
    ours = [name for name in whole if any(part in name for part in _OURS)]
    return [(name, whole[name] / total, own[name] / total) for name in sorted(ours, key=lambda name: -whole[name])]


def _print(title: str, cost: float, found: Iterable[tuple[str, float, float]]) -> None:
    print(f"\n{title}: {cost:.0f} µs per call")
    print("  with what it calls   own   function")
    for name, whole, own in found:
        if _LEAST <= whole < 1 or own >= _LEAST:
            print(f"  {whole:6.1%} {whole * cost:6.1f} µs {own:8.1%}   {name}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("load", choices=LOADS)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each of the two runs")
    asked = parser.parse_args()
    cores.use_load_core()
    with Bench(QUICK) as bench:
        load = LOADS[asked.load](bench)
        drive(load, min(1.0, asked.seconds))
        rate, main_cost, other_cost = measure(bench.service, load, asked.seconds)
        lines = sample(bench.service, load, asked.seconds)
    print(f"{asked.load}: {rate:,.0f} answers per second, {main_cost + other_cost:.0f} µs of processor time each")
    _print("the event loop's thread", main_cost, shares(lines, main=True))
    _print("all other threads", other_cost, shares(lines, main=False))


if __name__ == "__main__":
    main()
