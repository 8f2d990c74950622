"""`train?normalize=running`: a batch is folded, and normalized with the running statistics right after its own fold."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS

pytestmark = pytest.mark.anyio

URL = "/v1/layers/obs"
OBSERVE = f"{URL}/train?normalize=running"
BATCHES = [np.random.default_rng(seed).normal(seed, 2, (6, 3)).astype(np.float32) for seed in range(8)]


def _encoded(form: str, batch: np.ndarray) -> bytes:
    if form == JSON:
        return json.dumps({"input": batch.tolist()}).encode()
    if form == SAFETENSORS:
        return save({"input": batch})
    file = io.BytesIO()
    np.save(file, batch)
    return file.getvalue()


def _output(answer) -> np.ndarray:
    match answer.headers["content-type"]:
        case "application/json":
            return np.array(answer.json()["output"], np.float32)
        case "application/x-npy":
            return np.load(io.BytesIO(answer.content))
    return load(answer.content)["output"]


@pytest.fixture
def observe(client):
    """Send a batch; the answer."""

    async def send(batch: np.ndarray, form: str = SAFETENSORS, key: str | None = None, query: str = ""):
        headers = {"Content-Type": form} | ({"Idempotency-Key": key} if key else {})
        client.headers.pop("accept", None)
        return await client.post(OBSERVE + query, content=_encoded(form, batch), headers=headers)

    return send


@pytest.fixture
async def moving(client):
    (await client.put(URL, json={"num_features": 3})).raise_for_status()


@pytest.fixture
async def population(client):
    config = {"num_features": 3, "statistics": "population", "affine": False, "clip": 1.0}
    (await client.put(URL, json=config)).raise_for_status()


@pytest.mark.parametrize("form", [JSON, NPY, SAFETENSORS])
async def test_a_batch_is_normalized_as_torch_in_eval_mode_after_its_own_fold(observe, moving, form):
    module = torch.nn.BatchNorm1d(3)
    for number, batch in enumerate(BATCHES[:3], 1):
        answer = await observe(batch, form)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == form
        assert answer.headers["num-batches-tracked"] == str(number)
        assert answer.headers["etag"] == f'"{number + 1}"'
        module.train()(torch.from_numpy(batch))
        expected = module.eval()(torch.from_numpy(batch)).detach().numpy()
        np.testing.assert_array_equal(_output(answer), expected)


@pytest.mark.parametrize("channel_axis", [1, -1])
async def test_the_fold_is_bit_equal_to_that_of_train(client, observe, channel_axis):
    config = {"num_features": 3, "channel_axis": channel_axis}
    batches = [np.random.default_rng(seed).normal(1, 2, (4, 3, 5, 3)).astype(np.float32) for seed in range(3)]
    for name in (URL, "/v1/layers/other"):
        (await client.put(name, json=config)).raise_for_status()
    for batch in batches:
        (await observe(batch)).raise_for_status()
        headers = {"Content-Type": SAFETENSORS}
        (
            await client.post("/v1/layers/other/train", content=save({"input": batch}), headers=headers)
        ).raise_for_status()
    layer, other = [(await client.get(name)).json() for name in (URL, "/v1/layers/other")]
    for field in ("running_mean", "running_var", "num_batches_tracked", "samples_tracked"):
        assert layer[field] == other[field]


async def test_one_observation_is_enough_for_a_population_layer(observe, population):
    """VecNormalize: the running variance is 1 until there are two."""
    first, second = BATCHES[0][:1], BATCHES[1][:1]
    answer = await observe(first)
    np.testing.assert_allclose(_output(answer), np.zeros((1, 3)), atol=1e-6)  # it is the mean
    both = np.concatenate([first, second]).astype(np.float64)
    expected = (second - both.mean(0)) / np.sqrt(both.var(0, ddof=1) + 1e-5)
    np.testing.assert_allclose(_output(await observe(second)), np.clip(expected, -1, 1), rtol=1e-5)


async def test_one_observation_is_too_few_for_a_moving_layer(observe, moving):
    answer = await observe(BATCHES[0][:1])
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/too-few-values")


async def test_with_statistics_it_tells_those_it_used(client, observe, moving):
    answer = await observe(BATCHES[0], JSON, query="&statistics=true")
    layer = (await client.get(URL)).json()
    assert answer.json()["batch_mean"] == layer["running_mean"]
    assert answer.json()["batch_var"] == layer["running_var"]


async def test_a_repeat_is_counted_once_and_normalized_with_the_newest_statistics(client, observe, moving):
    first = await observe(BATCHES[0], key="k")
    (await observe(BATCHES[1])).raise_for_status()
    again = await observe(BATCHES[0], key="k")
    assert again.headers["idempotent-replay"] == "true"
    for header in ("num-batches-tracked", "batchnorm-version"):
        assert again.headers[header] == first.headers[header]
    headers = {"Content-Type": SAFETENSORS}
    now = await client.post(f"{URL}/eval", content=save({"input": BATCHES[0]}), headers=headers)
    np.testing.assert_array_equal(_output(again), _output(now))
    assert (await client.get(URL)).json()["num_batches_tracked"] == 2


async def test_how_it_is_normalized_belongs_to_the_fingerprint(client, observe, moving):
    (await observe(BATCHES[0], key="k")).raise_for_status()
    headers = {"Content-Type": SAFETENSORS, "Idempotency-Key": "k"}
    for query in ("", "?normalize=batch"):
        answer = await client.post(f"{URL}/train{query}", content=save({"input": BATCHES[0]}), headers=headers)
        assert answer.json()["type"] == "/problems/idempotency-key-reused"


async def test_batch_is_the_default(client, moving):
    headers = {"Content-Type": SAFETENSORS, "Idempotency-Key": "k"}
    for query in ("", "?normalize=batch"):
        answer = await client.post(f"{URL}/train{query}", content=save({"input": BATCHES[0]}), headers=headers)
        batch = torch.from_numpy(BATCHES[0])
        np.testing.assert_array_equal(_output(answer), torch.nn.BatchNorm1d(3)(batch).detach().numpy())


@pytest.mark.parametrize("query", ["&group=g&size=1", "&size=2&group=g"])
async def test_it_is_refused_in_a_group(client, observe, moving, query):
    answer = await observe(BATCHES[0], query=query)
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request")
    assert answer.json()["field"] == "normalize"


@pytest.mark.parametrize("way_off", ["at creation", "by PATCH"])
async def test_it_is_refused_for_a_layer_that_tracks_nothing(client, observe, way_off):
    created = {"num_features": 3} | ({"track_running_stats": False} if way_off == "at creation" else {})
    (await client.put(URL, json=created)).raise_for_status()
    if way_off == "by PATCH":
        (await observe(BATCHES[0], key="before")).raise_for_status()
        (await client.patch(URL, json={"track_running_stats": False})).raise_for_status()
        assert (await observe(BATCHES[0], key="before")).headers["idempotent-replay"] == "true"
    before = (await client.get(URL)).json()
    answer = await observe(BATCHES[1], key="k")
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request")
    assert (answer.json()["field"], answer.json()["expected"]) == ("normalize", "batch")
    assert (await client.get(URL)).json() == before


async def test_another_word_is_refused(client, moving):
    answer = await client.post(f"{URL}/train?normalize=Running", json={"input": BATCHES[0].tolist()})
    assert (answer.status_code, answer.json()["field"]) == (422, "normalize")


async def test_an_output_that_overflows_is_no_reason_to_refuse_it(client, observe, moving):
    """As in eval; train refuses it."""
    (await client.patch(URL, json={"weight": [3e38, 1, 1]})).raise_for_status()
    headers = {"Content-Type": SAFETENSORS}
    refused = await client.post(f"{URL}/train", content=save({"input": BATCHES[0] * 10}), headers=headers)
    assert refused.json()["type"] == "/problems/non-finite"
    answer = await observe(BATCHES[0] * 10)
    assert answer.status_code == 200, answer.text
    assert not np.isfinite(_output(answer)).all()
    assert (await client.get(URL)).json()["num_batches_tracked"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
async def test_statistics_that_are_not_finite_are_refused(client, observe, moving, bad):
    """3e38: finite, and its variance is not."""
    batch = BATCHES[0].copy()
    batch[2, 1] = bad
    before = (await client.get(URL)).json()
    assert (await observe(batch)).json()["type"] == "/problems/non-finite"
    assert (await client.get(URL)).json() == before
