"""`python -m fuzz.unguided TARGET SECONDS FOLDER`: one target by random changes; or with a file, its replay.

For where atheris is not installed; `fuzz.run` starts it.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

from fuzz.limits import MEBIBYTES, SECONDS, HangError, limited, peak
from fuzz.mutate import mutated
from fuzz.targets import TARGETS, inputs


def _too_long(*_: Any) -> None:
    raise HangError(f"over {SECONDS} s")


def fuzz(name: str, seconds: float, found: Path, random: Random) -> int:
    """Try what is there, then changes of it, until the time is over or a promise broken. Returns the exit status."""
    run = limited(TARGETS[name].promise, found / "faults" / name)
    corpus = [*inputs(name), *(path.read_bytes() for path in sorted((found / "corpus" / name).iterdir()))]
    signal.signal(signal.SIGALRM, _too_long)
    count, began, broken = 0, time.monotonic(), False
    while not broken and time.monotonic() < began + seconds and peak() < MEBIBYTES:
        data = corpus[count] if count < len(corpus) else mutated(random, corpus, TARGETS[name].longest)
        count += 1
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            run(data)
        except (Exception, HangError):
            traceback.print_exc()
            broken = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    rate = count / (time.monotonic() - began)
    print(
        f"stat::number_of_executed_units: {count}\nstat::average_exec_per_sec: {rate:.0f}\nstat::peak_rss_mb: {peak()}"
    )
    return int(broken or peak() >= MEBIBYTES)


def main() -> int:
    """Run the command line."""
    name, *rest = sys.argv[1:]
    if len(rest) == 1:
        limited(TARGETS[name].promise)(Path(rest[0]).read_bytes())
        print(f"{name}: {rest[0]} keeps its promise")
        return 0
    return fuzz(name, float(rest[0]), Path(rest[1]), Random())


if __name__ == "__main__":
    sys.exit(main())
