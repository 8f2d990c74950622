"""Train and eval in safetensors, against a server that sends the same bytes back."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.bodies import KIB, MIB, call, safetensors
from benchmarks.figures import Row, Target, in_turns, ratio
from benchmarks.load import Call, request


def evaluate(bench: Bench) -> Iterator[Row]:
    """Eval from small to large."""
    for size, connections, least in ((8 * KIB, 8, 0.4), (256 * KIB, 8, 0.95), (8 * MIB, 4, 0.85)):
        yield _against_echo(bench, "eval", size, connections, least)


def train(bench: Bench) -> Iterator[Row]:
    """Train: every answer is on disk before it goes out."""
    yield _against_echo(bench, "train", 8 * KIB, 32, 0.35)
    yield _against_echo(bench, "train", 8 * MIB, 4, 0.7)


def many_layers(bench: Bench) -> Iterator[Row]:
    """Commits of different layers share a disk flush as those of one layer do."""
    many = over_layers(bench)
    one = Call(bench.service.port, [call(bench.layer("one"), "train", safetensors(8 * KIB))], 32)
    bench.warm(many, one)
    pairs = in_turns(bench.pace.rounds, lambda: bench.rate(many), lambda: bench.rate(one))
    yield ratio("train 8 KiB over 64 layers, 32 connections, against one layer", Target(0.9), pairs)


def over_layers(bench: Bench) -> Call:
    """Train of 8 KiB, on 64 layers in turn."""
    body = safetensors(8 * KIB)
    return Call(bench.service.port, [call(bench.layer(f"many-{n}"), "train", body) for n in range(64)], 32)


def _against_echo(bench: Bench, what: str, size: int, connections: int, least: float) -> Row:
    body = safetensors(size)
    ours = Call(bench.service.port, [call(bench.layer("bench"), what, body)], connections)
    theirs = Call(bench.opponent("echo").port, [request("/", body, "application/octet-stream")], connections)
    bench.warm(ours, theirs)
    pairs = in_turns(bench.pace.rounds, lambda: bench.rate(ours), lambda: bench.rate(theirs))
    human = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
    return ratio(f"{what} {human}, {connections} connections, against the bare echo", Target(least), pairs)
