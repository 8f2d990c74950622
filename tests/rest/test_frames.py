"""Frames: the moments of many batches in one call, one commit and under one receipt."""

from __future__ import annotations

import numpy as np
import pytest

from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.tensors import Tensor, encode
from batchnorm_service.store.memory import MemoryStore

from .conftest import by_asgi

pytestmark = pytest.mark.anyio

ROWS, CHANNELS = 40, 3
URL = "/v1/layers/net.bn1"
CONFIGS = {
    "moving": {"num_features": CHANNELS},
    "population": {"num_features": CHANNELS, "statistics": "population"},
}


def _frame(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "count": random.integers(2, 30, rows),
        "mean": random.normal(3, 2, (rows, CHANNELS)),
        "var": random.random((rows, CHANNELS)),
    }


def _sent(form: str, tensors: dict[str, np.ndarray], **headers: str) -> dict:
    if form == JSON:
        return {"json": {name: array.tolist() for name, array in tensors.items()}, "headers": headers}
    wire = {name: Tensor.of(array) for name, array in tensors.items()}
    return {"content": b"".join(encode(SAFETENSORS, wire)), "headers": {"Content-Type": SAFETENSORS, **headers}}


@pytest.fixture(params=CONFIGS)
async def layer(request, client):
    (await client.put(URL, json=CONFIGS[request.param])).raise_for_status()
    return request.param


@pytest.fixture
async def moving(client):
    (await client.put(URL, json=CONFIGS["moving"])).raise_for_status()


@pytest.mark.parametrize("form", [JSON, SAFETENSORS])
async def test_a_frame_is_folded_as_its_rows_would_be_call_by_call(client, layer, form):
    answer = await client.post(f"{URL}/moments", **_sent(form, _frame()))
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"version": 2, "num_batches_tracked": ROWS, "folded": ROWS}
    assert answer.headers["etag"] == '"2"'
    (await client.put("/v1/layers/other", json=CONFIGS[layer])).raise_for_status()
    frame = _frame()
    for row in range(ROWS):
        one = {name: array[row] for name, array in frame.items()}
        (await client.post("/v1/layers/other/moments", **_sent(SAFETENSORS, one))).raise_for_status()
    found, expected = [(await client.get(name)).json() for name in (URL, "/v1/layers/other")]
    assert found["num_batches_tracked"] == expected["num_batches_tracked"] == ROWS
    assert found["samples_tracked"] == expected["samples_tracked"] == frame["count"].sum()
    for name in ("running_mean", "running_var"):
        if layer == "moving":
            assert found[name] == expected[name]
        else:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)  # the layer's float32


async def test_a_frame_of_float32_is_the_same_batch_in_either_form(client, moving):
    frame = _frame() | {"mean": _frame()["mean"].astype(np.float32)}
    first = await client.post(f"{URL}/moments", **_sent(SAFETENSORS, frame, **{"Idempotency-Key": "k"}))
    again = await client.post(f"{URL}/moments", **_sent(JSON, frame, **{"Idempotency-Key": "k"}))
    assert first.status_code == again.status_code == 200, again.text
    assert again.headers["idempotent-replay"] == "true"
    assert again.json() == first.json()


async def test_a_repeated_frame_counts_once_and_has_one_receipt(client, service, moving):
    for _ in range(3):
        (await client.post(f"{URL}/moments", **_sent(JSON, _frame(), **{"Idempotency-Key": "k"}))).raise_for_status()
    assert (await client.get(URL)).json()["num_batches_tracked"] == ROWS
    assert len(service.store._receipts) == 1
    other = await client.post(f"{URL}/moments", **_sent(JSON, _frame(1), **{"Idempotency-Key": "k"}))
    assert other.json()["type"] == "/problems/idempotency-key-reused"


@by_asgi
@pytest.mark.parametrize(
    ("form", "field", "value", "problem"),
    [
        (JSON, "count", -1, "invalid-request"),
        (SAFETENSORS, "count", 1, "too-few-values"),
        (JSON, "var", -0.5, "invalid-request"),
        (SAFETENSORS, "var", np.inf, "non-finite"),
        (SAFETENSORS, "mean", np.nan, "non-finite"),
        (SAFETENSORS, "mean", 1e39, "non-finite"),
    ],
)
async def test_a_frame_whose_700th_row_is_bad_changes_nothing_and_names_the_row(
    client, moving, form, field, value, problem
):
    frame = _frame(rows=1000)
    frame[field][700] = value
    before = (await client.get(URL)).json()
    answer = await client.post(f"{URL}/moments", **_sent(form, frame))
    assert (answer.status_code, answer.json()["type"]) == (422, f"/problems/{problem}"), answer.text
    assert answer.json()["row"] == 700
    assert "row 700" in answer.json()["detail"]
    assert (await client.get(URL)).json() == before


@by_asgi
@pytest.mark.parametrize(
    ("change", "problem", "field"),
    [
        ({"count": np.ones((ROWS, 1), np.int64)}, "shape-mismatch", "count"),
        ({"count": np.float64(5)}, "dtype-mismatch", "count"),
        ({"count": np.ones(ROWS)}, "dtype-mismatch", "count"),
        ({"count": np.full(ROWS - 1, 5)}, "shape-mismatch", "mean"),
        ({"count": np.full((), 5)}, "shape-mismatch", "mean"),
        ({"mean": np.ones((ROWS, CHANNELS + 1))}, "shape-mismatch", "mean"),
        ({"var": np.ones((ROWS + 1, CHANNELS))}, "shape-mismatch", "var"),
        ({"var": np.ones(CHANNELS)}, "shape-mismatch", "var"),
        ({"mean": np.ones((ROWS, CHANNELS), np.int64)}, "dtype-mismatch", "mean"),
        (_frame(rows=0), "invalid-request", "count"),
        ({"count": np.full(65_537, 5)}, "invalid-request", "count"),
    ],
)
async def test_a_frame_of_another_shape_is_refused(client, moving, change, problem, field):
    before = (await client.get(URL)).json()
    answer = await client.post(f"{URL}/moments", **_sent(SAFETENSORS, _frame() | change))
    assert (answer.json()["type"], answer.json()["field"]) == (f"/problems/{problem}", field), answer.text
    assert (await client.get(URL)).json() == before


@by_asgi
async def test_a_frame_has_up_to_65536_rows(client, layer):
    """It is folded in a thread: many rows take a while, however small they are."""
    answer = await client.post(f"{URL}/moments", **_sent(SAFETENSORS, _frame(rows=65_536)))
    assert answer.json()["folded"] == 65_536
    assert (await client.get(URL)).json()["num_batches_tracked"] == 65_536


async def test_a_frame_is_no_shard_of_a_group(client, moving):
    answer = await client.post(f"{URL}/moments?group=g&size=1", **_sent(SAFETENSORS, _frame()))
    assert (answer.json()["type"], answer.json()["field"]) == ("/problems/shape-mismatch", "count")
    assert "group" in answer.json()["detail"]


async def test_a_layer_that_tracks_nothing_takes_a_frame_as_it_takes_a_batch(client):
    (await client.put(URL, json=CONFIGS["moving"] | {"track_running_stats": False})).raise_for_status()
    answer = await client.post(f"{URL}/moments", **_sent(JSON, _frame()))
    assert answer.json() == {"version": 1, "num_batches_tracked": 0, "folded": ROWS}


async def test_one_commit_writes_a_frame(client, moving, monkeypatch):
    commits, commit = [], MemoryStore.commit

    async def counted(self, name, *arguments):
        commits.append(name)
        return await commit(self, name, *arguments)

    monkeypatch.setattr(MemoryStore, "commit", counted)
    (await client.post(f"{URL}/moments", **_sent(JSON, _frame()))).raise_for_status()
    assert commits == ["net.bn1"]


@pytest.mark.parametrize("separator", [".", "/"])
async def test_many_layers_take_frames_and_batches_as_safetensors(client, separator):
    """Names may have dots: the last part is the tensor's."""
    for name in ("net.bn1", "net.mean"):
        (await client.put(f"/v1/layers/{name}", json=CONFIGS["population"])).raise_for_status()
    frame, bad = _frame(), _frame(1)
    bad["var"][7] = -1
    layers = {"net.bn1": frame, "net.mean": {name: array[0] for name, array in frame.items()}, "net.bn2": bad}
    (await client.put("/v1/layers/net.bn2", json=CONFIGS["moving"])).raise_for_status()
    tensors = {f"{layer}{separator}{name}": one for layer, each in layers.items() for name, one in each.items()}
    answer = await client.post("/v1/moments", **_sent(SAFETENSORS, tensors))
    results = answer.json()["layers"]
    assert results["net.bn1"] == {"version": 2, "num_batches_tracked": ROWS, "folded": ROWS, "replayed": False}
    assert results["net.mean"] == {"version": 2, "num_batches_tracked": 1, "replayed": False}
    assert (results["net.bn2"]["type"], results["net.bn2"]["row"]) == ("/problems/invalid-request", 7)


async def test_many_layers_take_frames_as_json(client, moving):
    document = {"layers": {"net.bn1": {name: array.tolist() for name, array in _frame(rows=3000).items()}}}
    answer = await client.post("/v1/moments", json=document)
    assert answer.json()["layers"]["net.bn1"]["folded"] == 3000


@by_asgi
@pytest.mark.parametrize("names", [("bn/count", "bn.count"), ("bn.std",)])
async def test_names_that_are_not_moments_are_refused(client, names):
    answer = await client.post("/v1/moments", **_sent(SAFETENSORS, dict.fromkeys(names, np.array(3))))
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request"), answer.text
