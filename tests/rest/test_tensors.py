"""Train, eval and state in the three forms that tensors have on the wire."""

import io
import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS
from batchnorm_service.tokens import EVERYTHING

pytestmark = pytest.mark.anyio

BATCH = np.array([[1, 2], [3, 4], [5, 9]], np.float32)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def body(form, array):
    match form:
        case "application/json":
            return json.dumps({"input": array.tolist()}).encode()
        case "application/x-npy":
            return npy(array)
        case _:
            return save({"input": array})


def output(answer):
    match answer.headers["content-type"]:
        case "application/json":
            return np.array(answer.json()["output"], np.float32)
        case "application/x-npy":
            return np.load(io.BytesIO(answer.content))
        case _:
            return load(answer.content)["output"]


def bfloat16(rows):
    header = json.dumps({"input": {"dtype": "BF16", "shape": [len(rows), 1], "data_offsets": [0, 2 * len(rows)]}})
    header += " " * (-len(header) % 8)
    data = b"".join(np.float32(row).tobytes()[2:] for row in rows)
    return len(header).to_bytes(8, "little") + header.encode() + data


@pytest.mark.parametrize("call", ["train", "eval"])
@pytest.mark.parametrize("asked", [JSON, NPY, SAFETENSORS, None, "*/*"])
@pytest.mark.parametrize("sent", [JSON, NPY, SAFETENSORS])
async def test_every_form_in_and_out(client, layer, call, sent, asked):
    headers = {"Content-Type": sent, **({} if asked is None else {"Accept": asked})}
    if asked is None:
        client.headers.pop("accept")
    answer = await client.post(f"{layer}/{call}", content=body(sent, BATCH), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == (sent if asked in (None, "*/*") else asked)
    expected = BATCH
    if call == "train":
        expected = (BATCH - BATCH.mean(0)) / np.sqrt(BATCH.var(0) + 1e-5)
    else:
        running = (await client.get(layer)).json()
        expected = (BATCH - np.array(running["running_mean"])) / np.sqrt(np.array(running["running_var"]) + 1e-5)
    np.testing.assert_allclose(output(answer), expected, rtol=1e-5, atol=1e-6)
    version, batches = (3, 2) if call == "train" else (2, 1)
    assert answer.headers["etag"] == f'"{version}"'
    assert answer.headers["batchnorm-version"] == str(version)
    assert answer.headers["num-batches-tracked"] == str(batches)
    if answer.headers["content-type"] == JSON:
        assert (answer.json()["version"], answer.json()["num_batches_tracked"]) == (version, batches)


@pytest.mark.parametrize("form", [JSON, SAFETENSORS])
async def test_statistics(client, layer, form):
    answer = await client.post(
        f"{layer}/train?statistics=true", content=body(form, BATCH), headers={"Content-Type": form}
    )
    got = answer.json() if form == JSON else load(answer.content)
    np.testing.assert_allclose(got["batch_mean"], BATCH.mean(0))
    np.testing.assert_allclose(got["batch_var"], BATCH.var(0), rtol=1e-6)
    np.testing.assert_allclose(got["batch_invstd"], 1 / np.sqrt(BATCH.var(0) + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("call", ["train", "eval"])
async def test_npy_cannot_carry_statistics(client, layer, call):
    before = (await client.get(layer)).json()
    headers = {"Content-Type": NPY}
    answer = await client.post(f"{layer}/{call}?statistics=true", content=npy(BATCH), headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (406, "/problems/not-acceptable")
    headers["Accept"] = f"{NPY}, {SAFETENSORS};q=0.1"
    answer = await client.post(f"{layer}/eval?statistics=true", content=npy(BATCH), headers=headers)
    assert answer.headers["content-type"] == SAFETENSORS
    assert (await client.get(layer)).json() == before


async def test_a_bfloat16_output_cannot_be_npy(client):
    await client.put("/v1/layers/bn", json={"num_features": 1})
    headers = {"Content-Type": SAFETENSORS, "Accept": NPY}
    for call in ("train", "eval"):
        answer = await client.post(f"/v1/layers/bn/{call}", content=bfloat16([1, 2, 3]), headers=headers)
        assert (answer.status_code, answer.json()["type"]) == (406, "/problems/not-acceptable")
    assert (await client.get("/v1/layers/bn")).json()["version"] == 1
    headers["Accept"] = f"{NPY}, {JSON};q=0.5"
    answer = await client.post("/v1/layers/bn/train", content=bfloat16([1, 2, 3]), headers=headers)
    assert answer.headers["content-type"] == JSON


async def test_an_empty_batch_in_eval_gives_an_empty_output(client, layer):
    answer = await client.post(f"{layer}/eval", content=npy(BATCH[:0]), headers={"Content-Type": NPY})
    assert output(answer).shape == (0, 2)


async def test_a_repeat_with_its_key_is_folded_once(client, layer):
    headers = {"Idempotency-Key": "k" * 200, "Content-Type": NPY}
    first = await client.post(f"{layer}/train", content=npy(BATCH), headers=headers)
    await client.post(f"{layer}/train", content=npy(BATCH), headers={"Content-Type": NPY})
    headers["Content-Type"] = SAFETENSORS  # the same batch in another form
    again = await client.post(f"{layer}/train", content=save({"input": BATCH}), headers=headers)
    assert "idempotent-replay" not in first.headers
    assert again.headers["idempotent-replay"] == "true"
    for name in ("batchnorm-version", "num-batches-tracked"):
        assert again.headers[name] == first.headers[name]
    np.testing.assert_array_equal(output(again), output(first))
    assert (await client.get(layer)).json()["num_batches_tracked"] == 3


async def test_state_is_safetensors_by_default(client, layer):
    answer = await client.get(f"{layer}/state")
    assert answer.headers["content-type"] == SAFETENSORS
    assert answer.headers["batchnorm-version"] == "2"
    state = load(answer.content)
    assert set(state) == {"running_mean", "running_var", "num_batches_tracked", "weight", "bias"}
    assert state["num_batches_tracked"].shape == ()
    assert state["num_batches_tracked"].dtype == np.int64


async def test_state_as_json(client, layer):
    answer = await client.get(f"{layer}/state", headers={"Accept": "application/json;q=0.9, text/html"})
    assert answer.headers["content-type"] == JSON
    assert answer.json()["num_batches_tracked"] == 1
    assert (await client.get(f"{layer}/state", headers={"Accept": NPY})).status_code == 406


@pytest.mark.parametrize("form", [JSON, SAFETENSORS])
async def test_replace_state(client, layer, form):
    tensors = {"running_mean": np.array([7, 8], np.float32), "num_batches_tracked": np.array(5)}
    content = save(tensors)
    if form == JSON:
        content = json.dumps({name: tensor.tolist() for name, tensor in tensors.items()})
    answer = await client.put(f"{layer}/state", content=content, headers={"Content-Type": form})
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert (document["running_mean"], document["num_batches_tracked"], document["version"]) == ([7, 8], 5, 3)
    assert document["weight"] == [1, 1]


async def test_a_large_answer_goes_out_in_pieces(client):
    await client.put("/v1/layers/bn", json={"num_features": 4})
    batch = np.random.default_rng(0).normal(size=(50_000, 4)).astype(np.float32)
    answer = await client.post("/v1/layers/bn/train", content=npy(batch), headers={"Content-Type": NPY})
    assert int(answer.headers["content-length"]) == len(answer.content)
    np.testing.assert_allclose(output(answer).mean(0), np.zeros(4), atol=1e-4)


async def test_fastapi_answers_as_the_table_of_endpoints(service, layer):
    """FastAPI has train and eval as routes too; they must not drift from what the gateway does before it."""
    async with service.client() as client, service.client(WithState(service.gateway.app)) as routed:
        for call in ("eval", "train"):
            arguments = {"content": npy(BATCH), "headers": {"Content-Type": NPY, "Idempotency-Key": "same"}}
            short = await client.post(f"{layer}/{call}?statistics=false", **arguments)
            long = await routed.post(f"{layer}/{call}?statistics=false", **arguments)
            assert long.content == short.content
            assert long.headers["etag"] == short.headers["etag"]


class WithState:
    """What the gateway adds to the scope for the application inside."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app({**scope, "state": {"request_id": "r", "grant": EVERYTHING}}, receive, send)
