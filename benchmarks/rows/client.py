"""The Python client, against httpx with nothing around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx

from batchnorm_client import Client
from batchnorm_client.wire.media_types import SAFETENSORS
from benchmarks.bench import Bench
from benchmarks.bodies import KIB, batch, safetensors
from benchmarks.figures import Row, Target, in_turns, ratio


def client(bench: Bench) -> Iterator[Row]:
    """`layer.eval` of 8 KiB, against httpx that posts the same bytes to the echo."""
    body, x = safetensors(8 * KIB), batch(8 * KIB)
    url = f"http://127.0.0.1:{bench.opponent('echo').port}/"
    headers = {"Content-Type": SAFETENSORS}
    with Client(f"http://127.0.0.1:{bench.service.port}") as service, httpx.Client() as bare:
        layer = service.layer(bench.layer("bench"))

        def post() -> None:
            bare.post(url, content=body, headers=headers).raise_for_status().read()

        layer.eval(x)
        post()
        pairs = in_turns(
            bench.pace.rounds,
            lambda: _rate(lambda: layer.eval(x), bench.pace.seconds),
            lambda: _rate(post, bench.pace.seconds),
        )
    yield ratio("client: layer.eval of 8 KiB, against httpx that posts the same bytes to the echo", Target(0.7), pairs)


def _rate(function: Callable[[], object], seconds: float) -> float:
    begin = time.perf_counter()
    count = 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        function()
        count += 1
    return count / elapsed
