"""What a large request costs while it is in flight."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.bodies import KIB, MIB, call, safetensors
from benchmarks.figures import Row, Target
from benchmarks.load import Call, drive


def memory(bench: Bench) -> Iterator[Row]:
    """The most memory with several 8 MiB trains in flight, less what the idle service has, in bodies per request."""
    server = bench.own_service("memory")
    name, count = bench.layer("memory", server=server), bench.pace.in_flight
    drive(Call(server.port, [call(name, "train", safetensors(8 * KIB))]), bench.pace.seconds)
    idle = server.memory("VmRSS")
    large = Call(server.port, [call(name, "train", safetensors(8 * MIB))], count)
    values = []
    for _ in range(bench.pace.rounds):
        server.forget_peak()
        drive(large, bench.pace.seconds)
        values.append((server.memory("VmHWM") - idle) / count / (8 * MIB))
    server.stop()
    note = f"{count} in flight; idle {idle >> 20} MiB"
    yield Row("peak memory per train of 8 MiB in flight, in bodies", Target(4, least=False), tuple(values), note)
