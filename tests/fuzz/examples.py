"""Inputs to start from: what real callers send, and what a store or a setting holds."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.tensors import Tensor, encode_safetensors, itemsize
from batchnorm_service.engine.moments import Moments, empty_extremes
from batchnorm_service.engine.normalize import output_parameters
from batchnorm_service.engine.state import initial_state
from batchnorm_service.layers import records as codec
from batchnorm_service.layers.group_result import GroupResult
from batchnorm_service.layers.synchronized import FoldGroup, Part
from batchnorm_service.store.base import Receipt, Stamp
from batchnorm_service.store.valkey import keys
from batchnorm_service.tokens import Scope
from batchnorm_service.tokens.stored import format_tokens, new_token
from fuzz.streams import END

MADE = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = [[0.5, -1, 2e3], [1e-7, 3, "NaN"]]
INFERENCE = {
    "inputs": [{"name": "input", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 5]}],
    "parameters": {"mode": "train"},
}
MOMENTS = {"count": 4, "mean": [0.5, -1.0], "var": [1.0, 2.5]}


def json_bodies() -> list[bytes]:
    """A byte for the names and dtypes, and JSON."""
    bodies: list[Any] = [
        {"input": ROWS},
        {"input": [[["Infinity"], ["-Infinity"]]]},
        {"input": [[[[1]]], [[[2]]]], "grad_output": [[], []]},
        {"input": 3.4e38},
        {"input": 7.038531e-26},
        MOMENTS,
    ]
    texts = [json.dumps(body).encode() for body in bodies]
    texts += [b'{"input": [1, 2', b' {"input" :\t[ -0.0 ,1E+5 ,18446744073709551616, 12345678901234567890123 ] }\n']
    return [bytes([first]) + text for first in range(4) for text in texts]


def npy_files() -> list[bytes]:
    """Files that numpy writes, in each of its versions."""
    dtypes, shapes = ("<f4", "<f8", "<f2", ">f4", "|b1", "<c8", "<i8"), ((), (3,), (2, 3), (2, 0, 4))
    files = [_saved(np.zeros(shape, dtype), (1, 0)) for dtype in dtypes for shape in shapes]
    files += [_saved(np.ones((2, 3), np.float32), version) for version in ((2, 0), (3, 0))]
    return [*files, _saved(np.asfortranarray(np.ones((2, 3))), (1, 0))]


def _saved(array: np.ndarray, version: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, allow_pickle=False)
    return file.getvalue()


def _safetensors(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(
        encode_safetensors({name: Tensor.of(np.asarray(value)) for name, value in tensors.items()}, metadata)
    )


def safetensors_files() -> list[bytes]:
    """Files with none, one and several tensors."""
    names = ("bool", "bfloat16", "float8_e5m2", "complex64")
    others = {name: Tensor(name, (2, 1), bytes(2 * itemsize(name))) for name in names}
    return [
        _safetensors({}),
        _safetensors({"input": np.float32([[1, 2], [3, 4]])}, {"format": "pt"}),
        _safetensors({"count": np.int64(4), "mean": np.zeros(2), "empty": np.empty((0, 3), np.float16)}),
        b"".join(encode_safetensors(others)),
    ]


def tensors() -> list[bytes]:
    """A byte for the dtype, one for the rank, one for each dimension, and the elements' bytes."""
    numbers = np.float32([0, -0.0, 1.5, 1e-40, np.nan, np.inf, -np.inf]).tobytes()
    return [bytes([dtype, len(shape), *shape]) + numbers for dtype in range(19) for shape in ((), (3,), (2, 1, 3))]


def documents() -> list[bytes]:
    """A byte for the model, and JSON."""
    configs = [
        {"num_features": 2},
        {"num_features": 3, "statistics": "population", "momentum": None, "half_life": 100.0, "clip": 5.0},
        {"num_features": 1, "eps": 1e-3, "affine": False, "dimensions": 2, "channel_axis": -1, "device": "cuda:1"},
        {"num_features": 1, "dtype": "float64", "non_finite": "allow", "track_running_stats": False},
    ]
    changes = [
        {"weight": [1, 2], "bias": ["NaN", -1.5], "eps": 0.1, "momentum": None},
        {"track_running_stats": False, "non_finite": "allow", "clip": None, "half_life": None},
    ]
    resets = [{}, {"what": "all"}]
    return [
        bytes([first]) + json.dumps(body).encode()
        for first, bodies in enumerate((configs, changes, resets))
        for body in bodies
    ]


def moments() -> list[bytes]:
    """A byte for the form, and the moments of many layers."""
    arrays = {"count": np.int64(4), "mean": np.array([0.5, -1]), "var": np.array([1, 2.5])}
    many = {f"{layer}/{name}": array for layer in ("bn1", "layer1.0.bn2") for name, array in arrays.items()}
    bodies: list[Any] = [
        {"layers": {"bn1": MOMENTS, "layer1.0.bn2": MOMENTS}},
        {"layers": {"bn1": {"count": 1, "mean": [1, 2], "var": [-1, "NaN"]}, "bad name": {"count": 2.5}}},
        {"layers": {}},
    ]
    return [b"\1" + _safetensors(many), *(b"\0" + json.dumps(body).encode() for body in bodies)]


def heads() -> list[bytes]:
    """A line each for the target, Content-Type, Accept, If-Match, If-None-Match, two keys, and Authorization."""
    return [
        b"/v1/layers/bn/train?group=g&size=2&timeout=0.5&statistics=true\napplication/json; charset=utf-8\n"
        b'*/*;q=0.1, application/vnd.safetensors\n"7", W/"8"\n"7"\nkey\nrequest\nBearer all',
        b"/v1/layers/layer1.0.bn%31/eval\napplication/x-npy\napplication/*\n*\n*\n \n\xff\nbearer look",
        b"/problems/not-found?mode=eval\napplication/vnd.safetensors\ntext/html;q=1.000,a/b;q=0\n\ngzip\n",
        b"/v1/layers/bn/eval?at=7&expect=sha-256:" + b"0" * 64 + b"\n\n\n7\n",
        b"/v1/layers/bn?at=release-1\n\n\n7\n",
        b"/v1/layers/a%2Fb\n\n\n7\n",
        b"//v1/%76%31/../healthz?",
    ]


def records() -> list[bytes]:
    """A byte for the kind, and the bytes."""
    found = []
    for fields in ({}, {"statistics": "population", "half_life": 9.0}, {"affine": False, "track_running_stats": False}):
        config = LayerConfig(num_features=2, **fields)
        found.append(codec.encode_new(initial_state(config), MADE))
    moments = Moments(4, torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), correction=0)
    parameters = output_parameters(initial_state(LayerConfig(num_features=2, clip=5.0)))
    totals = FoldGroup.pack(FoldGroup.__new__(FoldGroup), Part(moments, empty_extremes(2), parameters))
    results = [GroupResult(2, {b"k" * 16: b"f" * 16, b"l" * 16: b"g" * 16}, rest).pack() for rest in (totals, b"")]
    receipt = keys.pack_receipt(Receipt(b"k" * 16, b"f" * 16, 7, 8, b"payload"))
    valkey = [receipt, keys.pack_stamp(Stamp(1, 2, 3)) + found[0], keys.Keys("bn").receipt("layer", 7, b"k" * 16)]
    return [bytes([kind]) + data for kind, several in enumerate((found, found, results, valkey)) for data in several]


def urls() -> list[bytes]:
    """URLs of every store."""
    return [
        b"memory:",
        b"sqlite:///layers.db",
        b"sqlite:////var/lib/a%20b/layers.db",
        b"valkey://localhost:6379/0",
        b"redis://user:p%40ssword@[::1]:7000/3?prefix=team-1",
        b"valkeys+cluster://:secret1@a.example,b.example:7001?ca=/etc/ca.pem&prefix=x",
        b"rediss://host?ca=/ca.pem",
        b"postgres://host/db",
    ]


def token_files() -> list[bytes]:
    """Token files with none, one and several tokens."""
    made = [new_token(scope, prefix)[1] for scope in Scope for prefix in ("", "team1.")]
    return [format_tokens(made[:count]) for count in (0, 1, len(made))]


def _request(call: str, body: bytes = b"", media: str = JSON, headers: str = "") -> bytes:
    head = f"{call} HTTP/1.1\r\nHost: x\r\nContent-Type: {media}\r\n{headers}"
    return (head + ("Content-Length: *\r\n\r\n" if body else "\r\n")).encode() + body


def _json(call: str, document: Any, headers: str = "") -> bytes:
    return _request(call, json.dumps(document).encode(), JSON, headers)


def _chunked(call: str, *chunks: bytes) -> bytes:
    text = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    return _request(call, headers="Transfer-Encoding: chunked\r\n") + text


def inference_requests() -> list[bytes]:
    """A byte that says whether two follow with the length of the JSON object, and a body."""
    tensor = {"name": "input", "shape": [2, 2], "datatype": "FP32"}
    sized = tensor | {"shape": [1, 4], "parameters": {"binary_data_size": 16}}
    wanted = [{"name": "output", "parameters": {"binary_data": True}}]
    texts: list[Any] = [
        {"inputs": [tensor | {"data": [1, -2.5, 1e-7, "NaN"]}], "id": "42"},
        {"inputs": [tensor | {"data": [[0, 1], ["Infinity", 3.4e38]]}], "outputs": wanted},
        {"parameters": {"mode": "train", "at": "a"}, "inputs": [tensor | {"datatype": "FP64", "data": [1, 2, 3, 4]}]},
        {"inputs": [{"data": [0.1, 65504, 6e-8, 7], **tensor, "datatype": "FP16"}], "model_name": "m"},
        {"inputs": [{"name": "input", "data": [0.1, 3e38, 1e-40, 7], "datatype": "BF16", "shape": [4]}]},
        {"inputs": [tensor | {"shape": [0, 2], "data": []}]},
    ]
    requests = [b"\1" + json.dumps(text).encode() for text in texts]
    for text in ({"inputs": [sized]}, {"inputs": [sized], "parameters": {"binary_data_output": True}}):
        head = json.dumps(text).encode()
        requests.append(b"\0" + len(head).to_bytes(2, "big") + head + np.float32([1, 2, 3, 4]).tobytes())
    return [*requests, b"\0\0\0" + bytes(24)]


def streams() -> list[bytes]:
    """A byte for the number of cuts, two for each, and requests."""
    batch = _safetensors({"input": np.float32([[1, 2], [3, 4]])})
    calls = [
        [_json("POST /v1/layers/bn/train", {"input": [[1, 2], [3, 5]]}, "Idempotency-Key: k\r\n")] * 2,
        [_request("POST /v1/layers/bn/eval", batch, SAFETENSORS, "Accept: application/x-npy\r\n")],
        [_request("POST /v1/layers/bn/train?statistics=true", batch, SAFETENSORS), _request("GET /v1/layers/bn/state")],
        [_json("POST /v1/layers/bn/moments", MOMENTS), _json("POST /v1/moments", {"layers": {"bn": MOMENTS}})],
        [_json("PATCH /v1/layers/bn", {"weight": [2, 3]}, 'If-Match: "1"\r\n'), _request("HEAD /v1/layers/bn")],
        [_json("POST /v1/layers/bn/reset", {"what": "all"}), _request("DELETE /v1/layers/bn")],
        [_json("POST /v1/layers/bn/backward?mode=eval", {"input": [[1, 2]], "grad_output": [[3, 4]]})],
        [_json("POST /v1/layers/bn/inverse", {"input": [[1, 2]]}), _request("GET /v1/layers?limit=1")],
        [_json("POST /v1/layers/bn/train?group=g&size=2&timeout=1", {"input": [[1, 2]]})],
        [_chunked("POST /v1/layers/bn/eval", b'{"input": ', b"[[1, 2]]}")],
        [_json("POST /v1/layers/none/eval", {"input": []}, "Expect: 100-continue\r\n")],
        [_json("POST /v1/layers/bn/eval", {"input": [[1, 2]]}, "Upgrade: h2c\r\nConnection: Upgrade\r\n")],
        [_json("POST /v1/layers/bn/eval", {"input": [[1, 2]]}, "Connection: close\r\n"), _request("GET /healthz")],
        [_json("PUT /v1/layers/bm", {"num_features": 3}), _json("PUT /v1/layers/bm", {"num_features": 4})],
        [_json("POST /v2/models/bn/infer", INFERENCE, "Idempotency-Key: k\r\n")] * 2,
        [_json("POST /v2/models/bn/versions/1/infer", INFERENCE), _request("GET /v2/models/bn"), _request("GET /v2/x")],
        [_request("GET /nothing"), b"GARBAGE\r\n\r\n"],
        [b"POST /v1/layers/bn/eval HTTP/1.0\r\nContent-Length: 100\r\n\r\nnot all of it"],
    ]
    return [b"\2\x00\x40\x01\x00" + END.join(requests) for requests in calls]
