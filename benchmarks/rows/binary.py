"""Train and eval in safetensors, against a server that sends the same bytes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.bench import Bench
from benchmarks.bodies import KIB, MIB, call, infer, safetensors
from benchmarks.figures import Row, Target, in_turns, ratio
from benchmarks.load import Call, drive, request
from benchmarks.process import Server


def evaluate(bench: Bench) -> Iterator[Row]:
    """Eval from small to large."""
    for size, connections, least in ((8 * KIB, 8, 0.4), (256 * KIB, 8, 0.95), (8 * MIB, 4, 0.85)):
        yield _against_echo(bench, "eval", size, connections, least)


def inference(bench: Bench) -> Iterator[Row]:
    """Processor time of a small eval by the Open Inference Protocol, with bytes both ways, and by V1."""
    layer = bench.layer("one")
    by_v2 = [infer(layer, 8 * KIB, number) for number in range(512)]  # each with an id of its own
    by_v1 = [call(layer, "eval", safetensors(8 * KIB))]
    for each in (by_v2, by_v1):
        used(bench, bench.service, each)
    pairs = in_turns(
        4 * bench.pace.rounds,
        lambda: used(bench, bench.service, by_v2),
        lambda: used(bench, bench.service, by_v1),
    )
    what = "processor time of a binary infer of 8 KiB by /v2, 8 connections, against eval"
    yield ratio(what, Target(1.3, least=False), pairs, " µs", 1e6)


def used(bench: Bench, server: Server, requests: Sequence[bytes]) -> float:
    """The server's processor time for one of the requests, which are sent in turn, in seconds."""
    before = server.used()
    done = drive(Call(server.port, requests, 8), max(bench.pace.seconds / 2, 0.3))  # time is counted in steps of 0.01 s
    return (server.used() - before) / len(done.latencies)


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
