"""What a caller that floods layer a costs a caller of layer b: `python -m benchmarks.fairness`.

The flood has at least ten times the connections that keep the service busy, each of which sends the next call as soon
as it has an answer, 503 included. The evals on b, one after the other, are measured with it and without, in turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Final, NamedTuple

from benchmarks import cores
from benchmarks.bench import Bench, Pace
from benchmarks.bodies import KIB, MIB, call, safetensors
from benchmarks.figures import in_turns
from benchmarks.load import Call, Measured, background, drive

FLOODS: Final[Mapping[str, tuple[str, int, int]]] = {
    "evals of 8 KiB": ("eval", 8 * KIB, 80),
    "trains of 8 KiB": ("train", 8 * KIB, 1000),
    "trains of 8 MiB": ("train", 8 * MIB, 40),
}
"""The call on a, the size of its batch, and ten times the connections beyond which more of them bring no more answers;
for small trains ten times would fit into the limit of concurrent calls, so there are twice as many as that limit."""

PROBES: Final = (8 * KIB, 8 * MIB)


class Turns(NamedTuple):
    """One flood, measured in turns.

    Attributes:
        flood, probe: the call on a, and the size of the evals on b.
        alone, beside: evals on b without the flood and with it.
    """

    flood: str
    probe: int
    alone: list[Measured]
    beside: list[Measured]

    def __str__(self) -> str:
        cells = [self.flood, _size(self.probe)]
        for percent in (50, 99):
            alone, beside = ([one.percentile(percent) * 1e3 for one in side] for side in (self.alone, self.beside))
            ratios = [b / a for a, b in zip(alone, beside, strict=True)]
            cells += [
                f"{statistics.median(alone):.2f} to {statistics.median(beside):.2f} ms",
                f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
            ]
        answered = sum(len(one.latencies) for one in self.beside)
        cells.append(f"{sum(one.refused for one in self.beside) / answered:.1%}")
        return f"| {' | '.join(cells)} |"


HEAD: Final = "| flood on a | evals on b | p50 | ratio | p99 | ratio | 503 on b |\n|---|---|---|---|---|---|---|"


def measure(bench: Bench, flood: str, probe: int, connections: int = 0) -> Turns:
    """Evals on b alone and beside the flood on a, in turns."""
    what, size, most = FLOODS[flood]
    port = bench.service.port
    flooding = Call(port, [call(bench.layer("a"), what, safetensors(size))], connections or most, refusals=True)
    probing = Call(port, [call(bench.layer("b"), "eval", safetensors(probe))], 1, refusals=True)
    bench.warm(probing)

    def beside() -> Measured:
        with background(flooding):
            return drive(probing, bench.pace.seconds)

    pairs = in_turns(bench.pace.rounds, lambda: drive(probing, bench.pace.seconds), beside)
    return Turns(flood, probe, *map(list, zip(*pairs, strict=True)))


def _size(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument("--flood", choices=FLOODS, action="append", help="by default all, one after the other")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--connections", type=int, default=0, help="of the flood")
    arguments = parser.parse_args()
    cores.use_load_core()
    print(HEAD, flush=True)
    with Bench(Pace(arguments.rounds, arguments.seconds, 0.2, 0, 0, peers=False)) as bench:
        for flood in arguments.flood or FLOODS:
            for probe in PROBES:
                print(measure(bench, flood, probe, arguments.connections), flush=True)


if __name__ == "__main__":
    main()
