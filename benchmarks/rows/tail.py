"""How long small calls wait while large ones are computed."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.bodies import KIB, MIB, call, safetensors
from benchmarks.figures import Row, Target, in_turns, ratio
from benchmarks.load import Call, background, drive


def tail(bench: Bench) -> Iterator[Row]:
    """The 99th percentile of small evals with a client that keeps training 8 MiB batches, against it without."""
    port = bench.service.port
    small = Call(port, [call(bench.layer("bench"), "eval", safetensors(8 * KIB))])
    large = Call(port, [call(bench.layer("large"), "train", safetensors(8 * MIB))], 1)
    bench.warm(large, small)

    def alone() -> float:
        return drive(small, bench.pace.seconds).percentile(99)

    def beside() -> float:
        with background(large):
            return drive(small, bench.pace.seconds).percentile(99)

    pairs = in_turns(bench.pace.rounds, beside, alone)
    what = "p99 of evals of 8 KiB, 8 connections, beside one that trains 8 MiB batches, against p99 alone"
    yield ratio(what, Target(4, least=False), pairs, " ms", 1e3)
