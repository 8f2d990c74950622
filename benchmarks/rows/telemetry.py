"""What metrics, traces and logs cost: processor time of a small eval, because its rate varies more between turns."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.bodies import KIB, call, safetensors
from benchmarks.figures import Row, Target, in_turns, ratio
from benchmarks.process import Server, opponent
from benchmarks.rows.binary import used

_OFF = {"BATCHNORM_METRICS": "0", "BATCHNORM_SLOW_CALL_SECONDS": "0"}


def metrics(bench: Bench) -> Iterator[Row]:
    """With metrics and without."""
    on, off = _services(bench, "metrics", {}, _OFF)
    yield _compare(bench, "with metrics", 1.05, on, off)


def telemetry(bench: Bench) -> Iterator[Row]:
    """Everything as it is when traces are on, against everything off; then with what is not meant for a loaded service.

    The last row compares the service without any of it with itself: what differs there is noise.
    """
    port = bench.running(opponent("collector")).port
    traces = {"BATCHNORM_TRACES": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    every = traces | {"OTEL_TRACES_SAMPLER": "parentbased_always_on"}
    few = traces | {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.001"}
    access = {"BATCHNORM_ACCESS_LOG": "1", "BATCHNORM_LOG_LEVEL": "info"}
    off, *services = _services(bench, "telemetry", _OFF, traces, few, access, every, _OFF)
    names = (
        ("with metrics, traces and the log", 1.05),
        ("the same, sampling one trace in a thousand", 1.05),
        ("with metrics and the access log", 1.5),
        ("with metrics, and every trace exported", 2.5),
        ("without, another time", 1.05),
    )
    for (what, most), service in zip(names, services, strict=True):
        yield _compare(bench, what, most, service, off)


def _services(bench: Bench, name: str, *variables: dict[str, str]) -> list[Server]:
    return [bench.own_service(f"{name}-{number}", **each) for number, each in enumerate(variables)]


def _compare(bench: Bench, what: str, most: float, on: Server, off: Server) -> Row:
    def spent(server: Server) -> float:
        return used(bench, server, [call(bench.layer("one", server=server), "eval", safetensors(8 * KIB))])

    for server in (on, off):
        spent(server)
    pairs = in_turns(4 * bench.pace.rounds, lambda: spent(on), lambda: spent(off))
    described = f"processor time of an eval of 8 KiB, 8 connections, {what}, against none of it"
    return ratio(described, Target(most, least=False), pairs, " µs", 1e6)
