"""The batches that travel, and the requests that carry them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import orjson

from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.tensors import Tensor, encode
from benchmarks.load import request

KIB, MIB = 1 << 10, 1 << 20
CHANNELS = 64
SHAPES = {8 * KIB: (32, CHANNELS), 256 * KIB: (1024, CHANNELS), 8 * MIB: (32, CHANNELS, 32, 32)}
_random = np.random.default_rng(0)


def batch(size: int) -> npt.NDArray[np.float32]:
    """A float32 batch of so many bytes with 64 channels."""
    return _random.standard_normal(SHAPES[size], dtype=np.float32)


def safetensors(size: int) -> bytes:
    """Such a batch as the service takes it."""
    return b"".join(encode(SAFETENSORS, {"input": Tensor.of(batch(size))}))


def square(side: int = 256) -> bytes:
    """A batch of 256x256 float32 numbers as JSON."""
    values = _random.standard_normal((side, side), dtype=np.float32)
    return orjson.dumps({"input": values}, option=orjson.OPT_SERIALIZE_NUMPY)


def call(layer: str, what: str, body: bytes, media_type: str = SAFETENSORS) -> bytes:
    """A call of the service on a layer."""
    return request(f"/v1/layers/{layer}/{what}", body, media_type)


def infer(layer: str, size: int, number: int) -> bytes:
    """An inference request with such a batch as bytes, for its output as bytes, as tritonclient and kserve send it."""
    data = batch(size)
    given = {"name": "input", "shape": data.shape, "datatype": "FP32", "parameters": {"binary_data_size": data.nbytes}}
    head = orjson.dumps({"id": f"{number:032x}", "inputs": [given], "parameters": {"binary_data_output": True}})
    headers = f"Inference-Header-Content-Length: {len(head)}\r\n"
    return request(f"/v2/models/{layer}/infer", head + data.tobytes(), "application/octet-stream", headers=headers)


def json_call(layer: str, body: bytes) -> bytes:
    """The same in JSON."""
    return call(layer, "eval", body, JSON)
