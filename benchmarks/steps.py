"""`python -m benchmarks.steps`: the steps of a call on 8 KiB, each alone in a loop, in microseconds.

No network and no other process: the smallest of many means, which a busy machine disturbs little. In a server each
step takes about twice as long, because caches are cold behind every system call. For a change of a few lines.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from uvicorn.server import ServerState

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_client.wire.tensors import decode
from batchnorm_service.app import create_app
from batchnorm_service.engine import normalize, running_statistics, tensors
from batchnorm_service.fast_path.protocol import Protocol
from batchnorm_service.layers import records
from batchnorm_service.server import uvicorn_config
from batchnorm_service.settings import Settings
from batchnorm_service.telemetry.requests import RequestMetrics
from benchmarks import bodies, cores

_ROUNDS, _CALLS = 60, 200


async def steps(directory: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """The steps by name, each ready to be called again and again."""
    settings = Settings(store=f"sqlite:///{directory}/layers.db", metrics=True)
    gateway = create_app(settings)
    async with gateway.app.router.lifespan_context(gateway.app):
        layers = gateway.app.state.layers
        await layers.create("bench", LayerConfig(num_features=bodies.CHANNELS))
        body = bytearray(bodies.safetensors(8 * bodies.KIB))
        request = bodies.call("bench", "eval", bytes(body))
        loop = _LOOP
        config = uvicorn_config(settings, gateway, lifespan="off")
        protocol = Protocol(config, ServerState(), {}, loop)  # type: ignore[arg-type]
        transport = _Transport()
        protocol.connection_made(transport)  # type: ignore[arg-type]
        wire = decode(SAFETENSORS, body, {"input": "float32"})["input"]
        await layers.batches.eval("bench", lambda _: {"input": wire})
        held = records.decode(await gateway.app.state.store.load("bench"))
        batch = tensors.to_torch(wire)
        reports = RequestMetrics(gateway.app.state.metrics).of("POST", "/v1/layers/{name}/eval")
        reported = None, 0.0003, len(body), len(body)
        output, step = normalize.eval_step(held.state, batch), normalize.train_step(held.state, batch)
        folded = dataclasses.replace(held, state=running_statistics.fold(held.state, step.moments))

        def answered() -> None:
            protocol.data_received(request)
            loop.turn()

        protocol.data_received(request)
        await asyncio.sleep(0)
        loop.turn()
        assert transport.sent, "an eval is answered at once"
        return iter(
            {
                "eval, from the request's bytes to the answer's": answered,
                "decode the body": lambda: decode(SAFETENSORS, body, {"input": "float32"}),
                "to torch": lambda: tensors.to_torch(wire),
                "eval step": lambda: normalize.eval_step(held.state, batch),
                "from torch": lambda: tensors.to_wire(output),
                "train step": lambda: normalize.train_step(held.state, batch),
                "fold": lambda: running_statistics.fold(held.state, step.moments),
                "encode the record": lambda: records.record(folded),
                "report a request to the metrics": lambda: reports.report(*reported),
            }.items()
        )


def microseconds(step: Callable[[], object], rounds: int) -> float:
    """Of one call, in the best of many rounds."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(_CALLS):
            step()
        best = min(best, (time.perf_counter() - begin) / _CALLS)
    return best * 1e6


class _Loop:
    """What the protocol asks of an event loop."""

    def __init__(self) -> None:
        self._next: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._next.append(callback)

    def turn(self) -> None:
        for callback in self._next:
            callback()
        self._next.clear()

    def call_later(self, _seconds: float, _callback: Callable[[], object]) -> None:
        return None

    def time(self) -> float:
        return 0.0


_LOOP = _Loop()


class _Transport:
    """Takes what is written, and counts it."""

    sent = 0

    def write(self, data: bytes) -> None:
        self.sent += len(data)

    def is_closing(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        """What is written has left at once."""

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        return default


def main() -> None:
    """Run the command line."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else _ROUNDS
    cores.use_load_core()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        measured = asyncio.run(steps(Path(directory)))
        # Nothing is awaited any more: what asks for the running loop gets the one that the protocol has.
        asyncio._set_running_loop(_LOOP)  # type: ignore[arg-type]
        for name, step in measured:
            print(f"{microseconds(step, rounds):6.1f} µs  {name}", flush=True)


if __name__ == "__main__":
    main()
