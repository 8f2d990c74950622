"""`python -m benchmarks`: measure and print the table. `make bench` and `make bench-quick` run it."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks import cores
from benchmarks.bench import FULL, QUICK, SMOKE, Bench
from benchmarks.figures import HEAD
from benchmarks.rows import ROWS


def main() -> None:
    """Measure the rows, and print each as it is done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--quick", dest="pace", action="store_const", const=QUICK, help="two minutes, no peers")
    pace.add_argument("--smoke", dest="pace", action="store_const", const=SMOKE, help="does it run at all?")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROWS", help=f"of {', '.join(ROWS)}")
    parser.set_defaults(pace=FULL)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    cores.use_load_core()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {_machine()}; {cores.described()}.\n\n{HEAD}", flush=True)
    with Bench(arguments.pace) as bench:
        for name in arguments.only or ROWS:
            for row in ROWS[name](bench):
                print(row, flush=True)
    print(f"\nMeasured in {time.perf_counter() - begin:.0f} s.", file=sys.stderr)


def _machine() -> str:
    """The processor and what matters of the software."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return (
        f"{model}, {len(cores.ALLOWED)} cores, {platform.system()} {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}, torch {version('torch')}, uvicorn {version('uvicorn')}"
    )


if __name__ == "__main__":
    main()
