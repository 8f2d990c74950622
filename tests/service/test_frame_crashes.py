"""A frame whose answer was lost, and whose service was killed, is counted once when it is repeated under its key."""

from __future__ import annotations

import socket
import time
from typing import Any

import httpx
import numpy as np
import pytest

from batchnorm_client import Client
from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_client.wire.tensors import Tensor, encode
from store.valkey_servers import free_port

ROWS, CHANNELS = 200, 4


def _frame(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(2, 30, ROWS), random.normal(3, 2, (ROWS, CHANNELS)), random.random((ROWS, CHANNELS))


def _send_and_leave(url: str, seed: int) -> None:
    """Send a frame, and do not wait for the answer."""
    tensors = dict(zip(("count", "mean", "var"), map(Tensor.of, _frame(seed)), strict=True))
    body = b"".join(encode(SAFETENSORS, tensors))
    host = httpx.URL(url)
    with socket.create_connection((host.host, host.port)) as connection:
        connection.sendall(
            f"POST /v1/layers/obs/moments HTTP/1.1\r\nHost: x\r\nContent-Type: {SAFETENSORS}\r\n"
            f"Idempotency-Key: frame-{seed}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )


@pytest.mark.timeout(120)
def test_a_frame_counts_once_through_lost_answers_and_kills(start: Any, store: str) -> None:
    """The first kill comes before, while or after the frame is committed, nobody knows which; the second after it."""
    arguments = ("--store", store, "--port", str(free_port()))
    server = start(*arguments)
    with Client(server.url) as client:
        obs, expected = (client.create_layer(name, CHANNELS) for name in ("obs", "expected"))
        for seed in range(2):
            _send_and_leave(server.url, seed)
            while seed == 1 and obs.inspect().num_batches_tracked < 2 * ROWS:
                time.sleep(0.01)
            server.close()
            server = start(*arguments)
            done = obs.fold_moments(*_frame(seed), key=f"frame-{seed}")
            assert done.num_batches_tracked == ROWS * (seed + 1)
            expected.fold_moments(*_frame(seed))
        assert done.replayed
        for name, value in expected.state_dict().items():
            np.testing.assert_array_equal(obs.state_dict()[name], value)
