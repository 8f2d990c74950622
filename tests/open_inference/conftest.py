"""The service over a store in memory, by ASGI and by the fast path, and bodies as the protocol has them."""

import json

import numpy as np
import torch

from rest.conftest import anyio_backend, client, serve, service, way

__all__ = ["anyio_backend", "client", "infer", "serve", "service", "split", "tensor_of", "way"]

TORCH = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32, "FP64": torch.float64}
LENGTH = "Inference-Header-Content-Length"


def raw(tensor):
    """A tensor's bytes, without numpy, which has no bfloat16."""
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


def body_of(tensor, datatype, *, binary, **members):
    """An inference request's body and headers."""
    given = {"name": "input", "shape": list(tensor.shape), "datatype": datatype}
    if not binary:
        given["data"] = tensor.double().flatten().tolist()
        return json.dumps({"inputs": [given], **members}).encode(), {}
    content = raw(tensor)
    given["parameters"] = {"binary_data_size": len(content)}
    head = json.dumps({"inputs": [given], **members}).encode()
    return head + content, {LENGTH: str(len(head))}


async def infer(client, name, tensor, datatype="FP32", *, binary=False, headers=(), version=None, **members):
    """The answer to an inference request."""
    body, own = body_of(tensor, datatype, binary=binary, **members)
    path = f"/v2/models/{name}" + (f"/versions/{version}" if version else "") + "/infer"
    return await client.post(path, content=body, headers={**own, **dict(headers)})


def split(answer):
    """An answer's JSON object, and the bytes after it."""
    assert answer.status_code == 200, answer.text
    length = answer.headers.get(LENGTH)
    if length is None:
        assert answer.headers["content-type"] == "application/json"
        return answer.json(), b""
    assert answer.headers["content-type"] == "application/octet-stream"
    return json.loads(answer.content[: int(length)]), answer.content[int(length) :]


def tensor_of(answer):
    """An answer's output as a torch tensor."""
    document, rest = split(answer)
    (output,) = document["outputs"]
    dtype, shape = TORCH[output["datatype"]], output["shape"]
    if "data" in output:
        assert rest == b""
        assert "parameters" not in output
        numbers = [float(number) for number in output["data"]]  # "NaN" and "Infinity" are strings
        return torch.tensor(numbers, dtype=torch.float64).to(dtype).reshape(shape)
    assert output["parameters"] == {"binary_data_size": len(rest)}
    if not rest:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(rest), dtype=dtype).reshape(shape)


def batch(rows=6, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(rows).normal(2, 3, (rows, 2))).to(dtype)
