"""`GET /v1/layers/{name}/drift` (shared/http-api.md, "Drift")."""

from datetime import UTC, datetime

import numpy as np
import pytest

pytestmark = pytest.mark.anyio

LAYER = "/v1/layers/bn"
FIELDS = ["batches", "score", "worst", "channels", "threshold", "drifting", "since"]


async def send(client, call, count, mean, deviation=1.0, rows=32):
    rng = np.random.default_rng(count)
    for _ in range(count):
        batch = rng.normal(mean, deviation, (rows, len(mean))).tolist()
        (await client.post(f"{LAYER}/{call}", json={"input": batch})).raise_for_status()


@pytest.fixture
async def trained(client):
    """A layer of two channels that saw 30 batches of mean 3 and deviation 1."""
    (await client.put(LAYER, json={"num_features": 2})).raise_for_status()
    await send(client, "train", 30, [3, 3])
    return client


async def read(client):
    answer = await client.get(f"{LAYER}/drift")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


async def test_a_new_layer_has_none(client):
    (await client.put(LAYER, json={"num_features": 2})).raise_for_status()
    found = await read(client)
    assert list(found) == FIELDS
    assert found == {
        "batches": 0,
        "score": 0.0,
        "worst": None,
        "channels": {"z": [0.0, 0.0], "log_var_ratio": [0.0, 0.0]},
        "threshold": 0.5,
        "drifting": False,
        "since": None,
    }


async def test_it_rises_and_falls_with_what_eval_gets(trained):
    found = await read(trained)
    assert list(found) == FIELDS
    assert (found["batches"], found["score"], found["drifting"], found["since"]) == (29, 0.0, False, None)
    assert np.abs(found["channels"]["z"]).max() < 0.3

    await send(trained, "eval", 10, [3, -1])
    found = await read(trained)
    assert (found["batches"], found["drifting"], found["threshold"]) == (39, True, 0.5)
    assert list(found["worst"]) == ["channel", "z", "log_var_ratio"]
    assert found["worst"]["channel"] == 1
    assert -4.5 < found["worst"]["z"] < -3
    for name, values in found["channels"].items():
        assert len(values) == 2
        assert found["worst"][name] == pytest.approx(values[1], rel=1e-6)
    assert abs(found["channels"]["z"][0]) < 0.5
    assert found["score"] > 1
    since = datetime.fromisoformat(found["since"])
    assert 0 <= (datetime.now(UTC) - since).total_seconds() < 60

    await send(trained, "eval", 30, [3, 3])
    found = await read(trained)
    assert (found["batches"], found["drifting"], found["since"]) == (69, False, None)
    assert found["score"] < 0.25


async def test_it_sees_a_variance_that_changed(trained):
    await send(trained, "eval", 20, [3, 3], deviation=3.0)
    found = await read(trained)
    assert found["drifting"]
    assert found["worst"]["log_var_ratio"] == pytest.approx(np.log(9), abs=0.4)
    assert abs(found["worst"]["z"]) < 0.6


async def test_every_call_that_normalizes_counts(trained):
    (await trained.post(f"{LAYER}/train?normalize=running", json={"input": [[3, 3], [4, 2]]})).raise_for_status()
    stack = {"count": [4, 4], "mean": [[3, 3], [3, 3]], "var": [[1, 1], [1, 1]]}
    (await trained.post(f"{LAYER}/moments", json=stack)).raise_for_status()
    infer = {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP32", "data": [3, 3]}]}
    (await trained.post("/v2/models/bn/infer", json=infer)).raise_for_status()
    assert (await read(trained))["batches"] == 29 + 1 + 2 + 1


async def test_calls_that_are_refused_or_look_back_do_not_count(trained):
    assert (await trained.post(f"{LAYER}/eval", json={"input": [[1, 2, 3]]})).status_code == 422
    assert (await trained.post(f"{LAYER}/train", json={"input": [["NaN", 1], [2, 3]]})).status_code == 422
    (await trained.post(f"{LAYER}/inverse", json={"input": [[90, 90]]})).raise_for_status()
    gradients = {"input": [[1, 2], [3, 4]], "grad_output": [[1, 1], [1, 1]]}
    (await trained.post(f"{LAYER}/backward?mode=eval", json=gradients)).raise_for_status()
    assert (await read(trained))["batches"] == 29


async def test_it_does_not_change_the_layer(trained):
    before = (await trained.get(LAYER)).json()
    await send(trained, "eval", 10, [9, 9])
    await read(trained)
    assert (await trained.get(LAYER)).json() == before


async def test_what_is_known_is_not_sent_again(trained):
    tag = (await trained.get(f"{LAYER}/drift")).headers["etag"]
    for known in (tag, f'"x", W/{tag}', "*"):
        answer = await trained.get(f"{LAYER}/drift", headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert (await trained.get(f"{LAYER}/drift", headers={"If-None-Match": '"x"'})).status_code == 200
    await send(trained, "eval", 1, [3, 3])
    answer = await trained.get(f"{LAYER}/drift", headers={"If-None-Match": tag})
    assert (answer.status_code, answer.json()["batches"]) == (200, 30)


async def test_problems(client):
    answer = await client.get(f"{LAYER}/drift")
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/layer-not-found")
    answer = await client.get(f"{LAYER}/drift?at=1")
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request")
    answer = await client.post(f"{LAYER}/drift", json={})
    assert answer.status_code == 405


async def test_what_is_not_finite_drifts_and_is_forgotten(client):
    (await client.put(LAYER, json={"num_features": 2, "non_finite": "allow"})).raise_for_status()
    await send(client, "train", 30, [3, 3])
    for _ in range(10):
        (await client.post(f"{LAYER}/eval", json={"input": [[3, "NaN"], [3, 1e38]] * 8})).raise_for_status()
    found = await read(client)
    assert (found["drifting"], found["worst"]["channel"]) == (True, 1)
    await send(client, "eval", 40, [3, 3])
    found = await read(client)
    assert not found["drifting"]
    assert np.isfinite(found["channels"]["z"]).all()


async def test_it_is_off_where_the_setting_says_so(serve):
    async with serve(drift=False) as service, service.client() as client:
        (await client.put(LAYER, json={"num_features": 2})).raise_for_status()
        await send(client, "train", 3, [3, 3])
        assert (await read(client))["batches"] == 0


async def test_the_threshold_is_a_setting(serve):
    async with serve(drift_threshold=9.0) as service, service.client() as client:
        (await client.put(LAYER, json={"num_features": 2})).raise_for_status()
        await send(client, "train", 30, [3, 3])
        await send(client, "eval", 10, [3, 8])
        found = await read(client)
        assert (found["threshold"], found["drifting"]) == (9.0, False)
        assert found["score"] > 1


async def test_tokens(serve):
    """A read token is enough; one that is bound to a prefix sees its layers only."""
    async with serve(token="secret", read_token="reader") as service:
        async with service.client(authorization="Bearer secret") as admin:
            (await admin.put(LAYER, json={"num_features": 2})).raise_for_status()
        async with service.client(authorization="Bearer reader") as reader:
            assert (await reader.get(f"{LAYER}/drift")).status_code == 200
        async with service.client() as nobody:
            assert (await nobody.get(f"{LAYER}/drift")).status_code == 401
