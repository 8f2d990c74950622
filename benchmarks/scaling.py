"""How one hot layer and a whole fleet scale: measured contention on a real Valkey, and a model fitted to it.

`python -m benchmarks.scaling` starts a Valkey server, lets 1 to 8 replicas train one layer at once, prints what that
cost, and reckons from it what a million train and ten million eval calls per second would take.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import bodies
from benchmarks.contention import CHANNELS, Run, contend
from benchmarks.fleet import BUSY, Load, Measured, fleet, layer_rate, time_in_queue
from benchmarks.load import Call, drive, request
from benchmarks.process import Server, service

# The tests know how to start a server.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from store import valkey_servers

REPLICAS = (1, 2, 4, 8)
SIZES = (1, 4, 16, 64)


# ------------------------------------------------------------------------------------------- one service over HTTP


class Cost(NamedTuple):
    """Seconds of a core, and bytes in the store, that a call takes."""

    replica: float
    shard: float
    memory: float


def cost(server: Any, process: Server, what: str, layers: int, calls: int) -> Cost:
    """Make many calls over HTTP on different layers, and see what they took."""
    body = bodies.safetensors(8 * bodies.KIB)
    requests = [bodies.call(f"cost{number % layers}", what, body) for number in range(layers)]
    load = Call(process.port, requests, connections=8)
    drive(load, 60, layers)  # every layer is resident
    before = process.used(), _shard_used(server), int(server.info("used_memory"))
    drive(load, 600, calls)
    after = process.used(), _shard_used(server), int(server.info("used_memory"))
    return Cost(*((new - old) / calls for old, new in zip(before, after, strict=True)))


def _shard_used(server: Any) -> float:
    return float(server.info("used_cpu_user")) + float(server.info("used_cpu_sys"))


def costs(server: Any, layers: int, calls: int) -> tuple[Cost, Cost, float]:
    """Of a train call and of an eval, and the bytes of a layer."""
    process = service(server.url)
    try:
        before = int(server.info("used_memory"))
        for number in range(layers):
            config = request(
                f"/v1/layers/cost{number}", b'{"num_features": %d}' % CHANNELS, "application/json", method="PUT"
            )
            _answered(process.port, config)
        layer = (int(server.info("used_memory")) - before) / layers
        return cost(server, process, "train", layers, calls), cost(server, process, "eval", layers, calls), layer
    finally:
        process.stop()


def _answered(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(data)
        answer = connection.recv(65536)
        assert answer.startswith((b"HTTP/1.1 201", b"HTTP/1.1 200")), answer


# ------------------------------------------------------------------------------------------------------- fitting


def fitted(alone: list[Run], together: list[Run]) -> tuple[float, float, float]:
    """Seconds per commit and per fold from runs of one replica, and tries per further replica from runs of several."""
    sizes = np.array([run.calls / run.commits for run in alone])
    times = np.array([run.seconds / run.commits for run in alone])
    fold, commit = np.polyfit(sizes, times, 1)
    rivals = np.array([run.replicas - 1 for run in together])
    tries = np.array([run.commits / (run.commits - run.conflicts) - 1 for run in together])
    return max(float(commit), 1e-6), max(float(fold), 1e-6), float((rivals @ tries) / max(rivals @ rivals, 1))


def table(runs: list[Run]) -> Iterator[str]:
    """The runs as a table."""
    yield (
        "| replicas | callers of each | folds/s | commits per call | races lost | round trips per call | p50 | p99"
        " | slowest replica, of the fastest |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for run in runs:
        fifty, most = (1000 * run.waits[int(len(run.waits) * share)] for share in (0.5, 0.99))
        yield (
            f"| {run.replicas} | {run.callers} | {run.rate:,.0f} | {run.commits / run.calls:.3f}"
            f" | {run.conflicts / run.commits:.0%} | {run.trips:.3f} | {fifty:.1f} ms | {most:.0f} ms"
            f" | {run.slowest:.0%} |"
        )


def report(server: Any, *, smoke: bool) -> Iterator[str]:
    """Measure, fit, reckon."""
    seconds = 0.1 if smoke else 1.0
    sizes, replicas = ((1, 8), (1, 2)) if smoke else (SIZES, REPLICAS)
    alone = [contend(server.url, 1, size, seconds, f"alone{size}")[0] for size in sizes]
    together = [contend(server.url, many, 16, seconds, f"hot{many}")[0] for many in replicas]
    few = [contend(server.url, many, 2, seconds, f"warm{many}")[0] for many in replicas]
    groups = [contend(server.url, 2, size, seconds, f"group{size}")[0] for size in sizes]
    yield from ("", "## One layer, one replica", "", *table(alone))
    yield from ("", "## One layer, many replicas", "", *table(together + few))
    yield from ("", "## One layer, two replicas, larger groups", "", *table(groups))
    commit, fold, rival = fitted(alone, together)
    train, evaluation, layer = costs(server, 4 if smoke else 512, 50 if smoke else 5000)
    receipt = train.memory
    measured = Measured(
        train.replica, evaluation.replica, train.shard, evaluation.shard, commit, fold, rival, receipt, layer,
        8 * bodies.KIB,
    )  # fmt: skip
    yield from ("", "## Fitted", "", "| parameter | value |", "|---|---|")
    for name, value in measured._asdict().items():
        small = name not in {"rival", "receipt", "layer", "body"}
        yield f"| {name} | {f'{1e6 * value:.0f} µs' if small else f'{value:,.2f}'} |"
    yield from ("", "| callers of one replica | folds/s measured | by the model |", "|---|---|---|")
    for run in alone:
        modelled = layer_rate(measured, run.calls / run.commits)
        yield f"| {run.callers} | {run.rate:,.0f} | {modelled:,.0f} |"
    load = Load()
    yield from ("", f"## {load.train:,.0f} train and {load.eval:,.0f} eval calls/s on {load.layers:,.0f} layers", "")
    yield from fleet(measured, load)
    late = time_in_queue(measured.replica_train) + time_in_queue(measured.shard_train)
    yield from ("", f"A train call takes {1000 * late:.1f} ms in queues at cores that are {BUSY:.0%} busy.")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a moment only: the figures mean nothing")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, valkey_servers.server(Path(directory)) as server:
        for line in report(server, smoke=smoke):
            print(line, flush=True)


if __name__ == "__main__":
    main()
