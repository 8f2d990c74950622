"""Backward and inverse over HTTP."""

from __future__ import annotations

import asyncio

import numpy as np
import orjson
import pytest
import torch
from torch import nn

from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS
from batchnorm_client.wire.tensors import Tensor, decode, encode

pytestmark = pytest.mark.anyio

X = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
G = np.random.default_rng(2).normal(size=(6, 2)).astype(np.float32)


def _autograd(training: bool) -> dict[str, np.ndarray]:
    module = nn.BatchNorm1d(2).train(training)
    batch = torch.from_numpy(X.copy()).requires_grad_()
    module(batch).backward(torch.from_numpy(G))
    return {
        "grad_input": batch.grad.numpy(),
        "grad_weight": module.weight.grad.numpy(),
        "grad_bias": module.bias.grad.numpy(),
    }


@pytest.fixture
async def fresh(client):
    (await client.put("/v1/layers/fresh", json={"num_features": 2})).raise_for_status()
    return "/v1/layers/fresh"


@pytest.mark.parametrize("form", [JSON, SAFETENSORS])
@pytest.mark.parametrize("mode", ["train", "eval"])
async def test_backward_equals_autograd_and_changes_nothing(client, fresh, form, mode):
    before = (await client.get(fresh)).json()
    content = b"".join(encode(form, {"input": Tensor.of(X), "grad_output": Tensor.of(G)}))
    answer = await client.post(f"{fresh}/backward?mode={mode}", content=content, headers={"Content-Type": form})
    assert answer.status_code == 200, answer.text
    for name, expected in _autograd(mode == "train").items():
        if form == JSON:
            got = np.array(answer.json()[name], np.float32)
        else:
            got = decode(SAFETENSORS, bytearray(answer.content), dict.fromkeys(_autograd(True), "float32"))[
                name
            ].numpy()
        assert np.array_equal(got, expected), name
    assert answer.headers["batchnorm-version"] == "1"
    assert (await client.get(fresh)).json() == before


@pytest.mark.parametrize(
    ("document", "problem", "field"),
    [
        ({"input": [[1.0, 2.0]]}, "invalid-request", "grad_output"),
        ({"input": [[1.0, 2.0], [3.0, 4.0]], "grad_output": [[1.0, 2.0]]}, "shape-mismatch", "grad_output"),
        ({"input": [[1.0, 2.0]], "grad_output": [[1.0, 2.0]]}, "too-few-values", "input"),
        ({"input": [[1.0]], "grad_output": [[1.0]]}, "shape-mismatch", "input"),
    ],
)
async def test_bad_gradients_are_refused_by_name(client, fresh, document, problem, field):
    answer = await client.post(f"{fresh}/backward", json=document)
    assert answer.json()["type"] == f"/problems/{problem}", answer.text
    assert answer.json()["field"] == field


async def test_backward_refuses_what_it_does_not_know(client, fresh):
    assert (await client.post(f"{fresh}/backward?mode=test", json={})).json()["field"] == "mode"
    answer = await client.post(f"{fresh}/backward", content=b"", headers={"Content-Type": NPY})
    assert answer.status_code == 415
    answer = await client.post(f"{fresh}/backward", json={}, headers={"Accept": NPY})
    assert answer.status_code == 406


async def test_a_groups_shards_have_the_gradient_of_the_whole(client, fresh):
    url = f"{fresh}/backward?mode=train&group=g&size=2"
    shards = [slice(0, 2), slice(2, 6)]
    documents = [{"input": X[part].tolist(), "grad_output": G[part].tolist()} for part in shards]
    headers = [{"Idempotency-Key": f"member-{index}"} for index in range(2)]
    answers = await asyncio.gather(
        *(client.post(url, json=document, headers=one) for document, one in zip(documents, headers, strict=True))
    )
    expected = _autograd(True)
    joined = np.concatenate([np.array(answer.json()["grad_input"]) for answer in answers])
    assert np.allclose(joined, expected["grad_input"], rtol=1e-4, atol=1e-6)
    summed = sum(np.array(answer.json()["grad_weight"]) for answer in answers)
    assert np.allclose(summed, expected["grad_weight"], rtol=1e-4)
    again = await client.post(url, json=documents[0], headers=headers[0])
    assert again.headers["idempotent-replay"] == "true"
    assert again.json()["grad_input"] == answers[0].json()["grad_input"]
    assert (await client.get(fresh)).json()["version"] == 1


def _output(form: str, body: bytes) -> np.ndarray:
    if form == JSON:
        return np.array(orjson.loads(body)["output"], np.float32)
    return decode(form, bytearray(body), {"output": "float32"})["output"].numpy()


@pytest.mark.parametrize("form", [JSON, NPY, SAFETENSORS])
async def test_inverse_undoes_eval(client, layer, form):
    output = X
    for call in ("eval", "inverse"):
        content = b"".join(encode(form, {"input": Tensor.of(output)}))
        answer = await client.post(f"{layer}/{call}", content=content, headers={"Content-Type": form})
        assert answer.status_code == 200, answer.text
        output = _output(form, answer.content)
    assert np.allclose(output, X, rtol=1e-5, atol=1e-5)


async def test_clip_clips_train_and_eval_and_can_be_turned_off(client):
    url = "/v1/layers/clipped"
    (await client.put(url, json={"num_features": 1, "clip": 0.5})).raise_for_status()
    batch = {"input": [[-10.0], [0.0], [10.0]]}
    assert (await client.post(f"{url}/train", json=batch)).json()["output"] == [[-0.5], [0.0], [0.5]]
    assert (await client.post(f"{url}/eval", json=batch)).json()["output"][2] == [0.5]
    (await client.patch(url, json={"clip": None})).raise_for_status()
    assert (await client.post(f"{url}/eval", json=batch)).json()["output"][2][0] > 1


async def test_half_life_can_be_set_and_is_for_populations_only(client, layer):
    url = "/v1/layers/forgets"
    (await client.put(url, json={"num_features": 1, "statistics": "population"})).raise_for_status()
    assert (await client.patch(url, json={"half_life": 100.0})).json()["config"]["half_life"] == 100.0
    assert (await client.patch(url, json={"half_life": 0})).json()["field"] == "half_life"
    assert (await client.patch(layer, json={"half_life": 100.0})).json()["field"] == "half_life"
    assert (await client.put("/v1/layers/x", json={"num_features": 1, "half_life": 5.0})).json()["field"] == "half_life"
    assert (await client.patch(url, json={"momentum": 0.1})).json()["field"] == "momentum"
