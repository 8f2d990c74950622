"""Moments over HTTP: of one layer, of many, and as shards of a group."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from batchnorm_client.wire.media_types import JSON, SAFETENSORS
from batchnorm_client.wire.tensors import Tensor, encode
from batchnorm_service.engine import running_statistics
from batchnorm_service.layers import group_commit as plan

from .conftest import by_asgi

pytestmark = pytest.mark.anyio

BATCH = np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
MOMENTS = {"count": 3, "mean": BATCH.mean(0).tolist(), "var": BATCH.var(0).tolist()}
URL = "/v1/layers/a"


def _tensors(prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}count": Tensor.of(np.array(3, np.int64)),
        f"{prefix}mean": Tensor.of(BATCH.mean(0)),
        f"{prefix}var": Tensor.of(BATCH.var(0)),
    }


def _safetensors(tensors: dict[str, Tensor]) -> dict:
    return {"content": b"".join(encode(SAFETENSORS, tensors)), "headers": {"Content-Type": SAFETENSORS}}


@pytest.fixture
async def population(client):
    (await client.put(URL, json={"num_features": 2, "statistics": "population"})).raise_for_status()
    return URL


@pytest.mark.parametrize("form", [JSON, SAFETENSORS])
async def test_moments_are_folded_in_either_form(client, population, form):
    request = {"json": MOMENTS} if form == JSON else _safetensors(_tensors())
    answer = await client.post(f"{population}/moments", **request)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"version": 2, "num_batches_tracked": 1}
    layer = (await client.get(population)).json()
    assert layer["running_mean"] == [3.0, 3.0]
    assert layer["running_var"] == [4.0, 7.0]  # unbiased: 8 / 2 and 14 / 2
    assert layer["samples_tracked"] == 3


async def test_both_forms_are_the_same_batch_to_a_key(client, population):
    headers = {"Idempotency-Key": "k"}
    await client.post(f"{population}/moments", json=MOMENTS, headers=headers)
    request = _safetensors(_tensors())
    again = await client.post(f"{population}/moments", **request | {"headers": request["headers"] | headers})
    assert again.headers["idempotent-replay"] == "true"
    other = await client.post(f"{population}/moments", json=MOMENTS | {"count": 4}, headers=headers)
    assert other.json()["type"] == "/problems/idempotency-key-reused"


@pytest.mark.parametrize(
    ("change", "problem", "field"),
    [
        ({"count": -1}, "invalid-request", "count"),
        ({"count": 0}, "too-few-values", "count"),
        ({"count": 2.5}, "invalid-request", "count"),
        ({"count": [[3]]}, "shape-mismatch", "count"),
        ({"count": [3]}, "shape-mismatch", "mean"),
        ({"mean": [1.0]}, "shape-mismatch", "mean"),
        ({"var": [1.0, -1.0]}, "invalid-request", "var"),
        ({"var": [1.0, "NaN"]}, "non-finite", "var"),
        ({"std": [1.0, 1.0]}, "invalid-request", "std"),
    ],
)
async def test_bad_moments_are_refused_by_name_and_change_nothing(client, population, change, problem, field):
    before = (await client.get(population)).json()
    answer = await client.post(f"{population}/moments", json=MOMENTS | change)
    assert answer.json()["type"] == f"/problems/{problem}", answer.text
    assert answer.json()["field"] == field
    assert (await client.get(population)).json() == before


async def test_one_value_is_enough_for_a_population_and_too_few_for_moving_statistics(client, population):
    (await client.put("/v1/layers/moving", json={"num_features": 2})).raise_for_status()
    one = {"count": 1, "mean": [1.0, 2.0], "var": [0.0, 0.0]}
    assert (await client.post(f"{population}/moments", json=one)).status_code == 200
    answer = await client.post("/v1/layers/moving/moments", json=one)
    assert answer.json()["type"] == "/problems/too-few-values"


async def test_a_missing_tensor_and_a_npy_body_are_refused(client, population):
    answer = await client.post(f"{population}/moments", json={"count": 3, "mean": [1.0, 2.0]})
    assert (answer.status_code, answer.json()["field"]) == (422, "var")
    answer = await client.post(f"{population}/moments", content=b"", headers={"Content-Type": "application/x-npy"})
    assert answer.status_code == 415


async def test_a_fault_of_the_service_in_one_layer_does_not_hide_what_became_of_the_others(
    client, population, monkeypatch
):
    await client.put("/v1/layers/b", json={"num_features": 2})
    fold = running_statistics.fold_many

    def broken(state, batches):
        return 1 / 0 if state.config.statistics == "moving" else fold(state, batches)

    monkeypatch.setattr(plan, "fold_many", broken)
    monkeypatch.setattr(plan, "fold", lambda state, moments: broken(state, [moments]))
    answer = await client.post("/v1/moments", json={"layers": {"a": MOMENTS, "b": MOMENTS}})
    results = answer.json()["layers"]
    assert results["a"] == {"version": 2, "num_batches_tracked": 1, "replayed": False}
    assert (results["b"]["status"], results["b"]["type"]) == (500, "/problems/internal-error")
    assert results["b"]["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("form", [JSON, SAFETENSORS])
async def test_many_layers_in_one_call(client, population, form):
    (await client.put("/v1/layers/b", json={"num_features": 3})).raise_for_status()
    if form == JSON:
        request = {"json": {"layers": {"a": MOMENTS, "b": MOMENTS, "missing": MOMENTS, "bad name": MOMENTS}}}
    else:
        names = ("a/", "b/", "missing/", "bad name/")
        request = _safetensors({k: v for prefix in names for k, v in _tensors(prefix).items()})
    answer = await client.post("/v1/moments", **request)
    assert answer.status_code == 200, answer.text
    results = answer.json()["layers"]
    assert results["a"] == {"version": 2, "num_batches_tracked": 1, "replayed": False}
    assert results["b"]["type"] == "/problems/shape-mismatch"
    assert results["b"]["instance"] == "/v1/layers/b/moments"
    assert results["missing"]["type"] == "/problems/layer-not-found"
    assert results["bad name"]["type"] == "/problems/invalid-request"


async def test_a_repeat_of_many_does_what_is_missing(client, population):
    headers = {"Idempotency-Key": "step-1"}
    body = {"layers": {"a": MOMENTS, "later": MOMENTS}}
    await client.post("/v1/moments", json=body, headers=headers)
    (await client.put("/v1/layers/later", json={"num_features": 2})).raise_for_status()
    results = (await client.post("/v1/moments", json=body, headers=headers)).json()["layers"]
    assert (results["a"]["replayed"], results["later"]["replayed"]) == (True, False)
    assert (await client.get(population)).json()["num_batches_tracked"] == 1


@pytest.mark.parametrize("body", ["[]", '{"layers": []}', '{"layer": {}}', "{", '{"layers": {}, "x": 1}'])
async def test_a_body_that_is_not_many_moments_is_refused(client, body):
    answer = await client.post("/v1/moments", content=body, headers={"Content-Type": JSON})
    assert answer.status_code in (400, 422)


async def test_a_groups_members_get_the_moments_of_all(client, population):
    calls = [
        client.post(f"{population}/moments?group=g&size=2", json=MOMENTS),
        client.post(f"{population}/train?group=g&size=2", json={"input": [[7.0, 7.0]]}),
    ]
    folded, trained = await asyncio.gather(*calls)
    whole = np.concatenate([BATCH, [[7.0, 7.0]]])
    assert folded.json()["count"] == 4
    assert folded.json()["mean"] == whole.mean(0).tolist()
    assert np.allclose(folded.json()["var"], whole.var(0), rtol=1e-15)
    assert trained.json()["num_batches_tracked"] == folded.json()["num_batches_tracked"] == 1


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("group=g", "size"),
        ("size=2", "size"),
        ("group=g%20h&size=2", "group"),
        ("group=g&size=0", "size"),
        ("group=g&size=two", "size"),
        ("group=&size=2", "group"),
        ("group=g&size=2&timeout=0", "timeout"),
        ("group=g&size=2&timeout=nan", "timeout"),
        ("group=g&size=2&deadline=3", "deadline"),
    ],
)
async def test_a_group_that_makes_no_sense_is_refused_by_name(client, population, query, field):
    answer = await client.post(f"{population}/train?{query}", json={"input": [[7.0, 7.0]]})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request")
    assert answer.json()["field"] == field
    assert "more" not in answer.json()["detail"], "nothing else is wrong"


async def test_an_incomplete_group_is_told_so(client, population):
    url = f"{population}/train?group=g&size=2&timeout=0.05"
    answer = await client.post(url, json={"input": [[7.0, 7.0]]}, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["type"]) == (504, "/problems/group-incomplete")
    assert (answer.json()["expected"], answer.json()["got"]) == (2, 1)
    late = await client.post(url, json={"input": [[7.0, 7.0]]})
    assert (late.status_code, late.json()["type"]) == (409, "/problems/group-closed")
    other = await client.post(url.replace("size=2", "size=3"), json={"input": [[7.0, 7.0]]})
    assert (other.status_code, other.json()["type"]) == (422, "/problems/group-mismatch")
    assert (await client.get(population)).json()["num_batches_tracked"] == 0


@by_asgi
async def test_a_member_without_a_key_that_hangs_up_is_withdrawn(service, client, population):
    """As a real server does it: the connection closes while the call waits for others."""
    body = b'{"input": [[1.0, 2.0]]}'
    waits, hung_up = asyncio.Event(), asyncio.Event()

    async def receive():
        if not receive.read:
            receive.read = True
            return {"type": "http.request", "body": body}
        waits.set()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(_message):
        raise AssertionError("nobody is there to be answered")

    receive.read = False
    scope = {
        "type": "http",
        "method": "POST",
        "path": f"{population}/train",
        "raw_path": f"{population}/train".encode(),
        "query_string": b"group=g&size=2",
        "headers": [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(body))],
    }
    gone = asyncio.create_task(service.gateway(scope, receive, send))
    await waits.wait()
    hung_up.set()
    await gone
    answers = await asyncio.gather(
        *(client.post(f"{population}/train?group=g&size=2", json={"input": [[x, x]]}) for x in (5.0, 7.0))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert (await client.get(population)).json()["running_mean"] == [6.0, 6.0]
