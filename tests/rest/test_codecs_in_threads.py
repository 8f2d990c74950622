"""Large bodies are decoded, and large answers encoded, in threads; small ones are not worth one."""

import threading

import numpy as np
import orjson
import pytest
from safetensors.numpy import save

from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.tensors import json as json_codec
from batchnorm_client.wire.tensors import json_writer
from batchnorm_client.wire.tensors import safetensors as safetensors_codec
from batchnorm_service.rest import routes

pytestmark = pytest.mark.anyio

LAYER = "/v1/layers/l"
BATCH = [[1, 2], [3, 4], [5, 9]]
VIEWED = save({"input": np.array(BATCH, np.float32)})
ASKEW = (int.from_bytes(VIEWED[:8], "little") + 1).to_bytes(8, "little") + VIEWED[8:-24] + b" " + VIEWED[-24:]
MOMENTS = {"count": 4, "mean": [1, 2], "var": [0.5, 3]}
STATE = {"weight": [1, 2], "bias": [0, 1], "running_mean": [1, 2], "running_var": [3, 4], "num_batches_tracked": 7}
CALLS = {
    "train": ("POST", f"{LAYER}/train", {"input": BATCH}, "rw"),
    "a shard": ("POST", f"{LAYER}/train?group=g&size=1", {"input": BATCH}, "rw"),
    "eval": ("POST", f"{LAYER}/eval", {"input": BATCH}, "rw"),
    "inverse": ("POST", f"{LAYER}/inverse", {"input": BATCH}, "rw"),
    "backward": ("POST", f"{LAYER}/backward", {"input": BATCH, "grad_output": BATCH}, "rw"),
    "moments": ("POST", f"{LAYER}/moments", MOMENTS, "r"),
    "a shard's moments": ("POST", f"{LAYER}/moments?group=h&size=1", MOMENTS, "rw"),
    "many moments": ("POST", "/v1/moments", {"layers": {"l": MOMENTS}}, "r"),
    "state in": ("PUT", f"{LAYER}/state", STATE, "rw"),
    "state out": ("GET", f"{LAYER}/state", None, "w"),
    "layer": ("GET", LAYER, None, "w"),
    "update": ("PATCH", LAYER, {"weight": [1, 2]}, "rw"),
    "train, askew": ("POST", f"{LAYER}/train", ASKEW, "rw"),
    "state in, safetensors": ("PUT", f"{LAYER}/state", save({"weight": np.ones(2, np.float32)}), "rw"),
}
READERS = [
    (json_codec, "_values"),
    (safetensors_codec, "check_known"),
    (routes, "parse_document"),
]
WRITERS = [(json_writer, "widened")]


@pytest.fixture
def seen(monkeypatch):
    """Whether the event loop's thread has read, and has written."""
    seen = {"r": set(), "w": set()}

    def record(module, name, kind):
        function = getattr(module, name)

        def recorded(*arguments):
            seen[kind].add(threading.current_thread() is threading.main_thread())
            return function(*arguments)

        monkeypatch.setattr(module, name, recorded)

    for kind, functions in (("r", READERS), ("w", WRITERS)):
        for module, name in functions:
            record(module, name, kind)
    return seen


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("inline_bytes", [0, 1 << 20])
async def test_the_event_loop_neither_reads_nor_writes_what_is_large(serve, seen, case, inline_bytes):
    method, path, body, kinds = CALLS[case]
    async with serve(inline_bytes=inline_bytes) as service, service.client(accept=JSON) as client:
        (await client.put(LAYER, json={"num_features": 2})).raise_for_status()
        for threads in seen.values():
            threads.clear()
        media, content = (SAFETENSORS, body) if isinstance(body, bytes) else (JSON, orjson.dumps(body) if body else b"")
        answer = await client.request(method, path, content=content, headers={"Content-Type": media})
        assert answer.status_code == 200, answer.text
    assert seen == {kind: {inline_bytes > 0} if kind in kinds else set() for kind in "rw"}


async def test_what_is_only_viewed_needs_no_thread(serve, seen):
    """A hop to a thread and back is a good part of the time of a large batch."""
    async with serve(inline_bytes=0) as service, service.client(accept=SAFETENSORS) as client:
        (await client.put(LAYER, json={"num_features": 2})).raise_for_status()
        for threads in seen.values():
            threads.clear()
        large = save({"input": np.ones((1 << 14, 2), np.float32)})
        for call in ("train", "eval", "inverse"):
            answer = await client.post(f"{LAYER}/{call}", content=large, headers={"Content-Type": SAFETENSORS})
            assert answer.status_code == 200, answer.text
    assert seen == {"r": {True}, "w": set()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
async def test_a_large_update_sets_what_a_small_one_does(client, dtype):
    """Vectors of a large body are read as tensors, not as lists."""
    channels = 20_000
    weight = np.random.default_rng(0).standard_normal(channels)
    weight[[3, 5, 7]] = np.nan, np.inf, -np.inf
    named = [
        value if np.isfinite(value) else {"inf": "Infinity", "-inf": "-Infinity"}.get(str(value), "NaN")
        for value in weight.tolist()
    ]
    (await client.put(LAYER, json={"num_features": channels, "dtype": dtype, "non_finite": "allow"})).raise_for_status()
    answer = await client.patch(LAYER, json={"eps": 0.5, "bias": [1] * channels, "weight": named})
    assert answer.status_code == 200, answer.text
    layer = (await client.get(LAYER)).json()
    assert layer["config"]["eps"] == 0.5
    assert layer["bias"] == [1.0] * channels
    assert [value if isinstance(value, str) else np.dtype(dtype).type(value) for value in layer["weight"]] == [
        value if isinstance(value, str) else np.dtype(dtype).type(value) for value in named
    ]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weight": [1.0] * 20_001}, "weight"),
        ({"weight": [[1.0] * 20_000]}, "weight.0"),
        ({"weight": [1.0] * 19_999 + ["x"]}, "weight.19999"),
        ({"weight": [1.0] * 19_999 + [True]}, "weight.19999"),
        ({"weight": [1.0] * 20_000, "eps": -1}, "eps"),
        ({"weight": [1.0] * 20_000, "gamma": 1}, "gamma"),
        ({"weight": [1.0] * 19_999 + [1e300]}, "weight"),
        ({"bias": 1.0, "weight": [1.0] * 20_000}, "bias"),
    ],
)
async def test_a_large_update_is_refused_as_a_small_one_is(client, change, field):
    (await client.put(LAYER, json={"num_features": 20_000})).raise_for_status()
    answer = await client.patch(LAYER, json=change)
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert (await client.get(LAYER)).json()["version"] == 1
