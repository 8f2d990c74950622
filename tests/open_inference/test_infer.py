"""Inference against torch's module: every data type, as JSON and as bytes, both ways."""

import itertools
import json

import numpy as np
import pytest
import torch

from batchnorm_service.layers import batches

from .conftest import LENGTH, TORCH, batch, body_of, infer, raw, split, tensor_of

pytestmark = pytest.mark.anyio


@pytest.fixture
async def trained(client):
    """torch's module and the layer `bn`, trained with the same batch; and `wide`, in float64."""
    modules = {}
    for name, dtype in (("bn", torch.float32), ("wide", torch.float64)):
        config = {"num_features": 2, "dtype": str(dtype).removeprefix("torch.")}
        (await client.put(f"/v1/layers/{name}", json=config)).raise_for_status()
        modules[name] = torch.nn.BatchNorm1d(2, dtype=dtype)
        with torch.no_grad():
            expected = modules[name](batch(8, dtype))
        datatype = "FP64" if name == "wide" else "FP32"
        train = {"mode": "train", "binary_data_output": True}
        answer = await infer(client, name, batch(8, dtype), datatype, binary=True, parameters=train)
        assert torch.equal(tensor_of(answer), expected)
        assert split(answer)[0] | {"outputs": []} == {
            "model_name": name,
            "model_version": "2",
            "parameters": {"num_batches_tracked": 1},
            "outputs": [],
        }
        modules[name].eval()
    return modules


@pytest.mark.parametrize("datatype", TORCH)
async def test_every_data_type_both_ways(client, trained, datatype):
    name = "wide" if datatype == "FP64" else "bn"
    given = batch(6, TORCH[datatype])
    with torch.no_grad():
        expected = trained[name](given)
    outputs = []
    for binary_in, binary_out in itertools.product((False, True), repeat=2):
        wanted = [{"name": "output", "parameters": {"binary_data": binary_out}}]
        answer = await infer(client, name, given, datatype, binary=binary_in, outputs=wanted)
        assert (LENGTH in answer.headers) == binary_out
        outputs.append(tensor_of(answer))
        # Of the state that was used, V1 says the same.
        assert answer.headers["etag"] == '"2"'
        assert answer.headers["batchnorm-digest"].startswith("sha-256:")
    torch.testing.assert_close(outputs[0], expected)
    assert all(torch.equal(output, outputs[0]) for output in outputs)  # however it travels
    assert (await client.get(f"/v1/layers/{name}")).json()["version"] == 2


FORMS = [
    (None, None, False),
    (True, None, True),
    (False, None, False),
    (None, True, True),
    (True, False, False),
    (False, True, True),
]


async def test_where_the_output_goes(client, trained):
    for of_request, of_output, binary in FORMS:
        members = {} if of_request is None else {"parameters": {"binary_data_output": of_request}}
        wanted = {"name": "output"} | ({} if of_output is None else {"parameters": {"binary_data": of_output}})
        for outputs in [[wanted]] if of_output is not None else [[wanted], None, []]:
            answer = await infer(client, "bn", batch(), **members, **({} if outputs is None else {"outputs": outputs}))
            assert (LENGTH in answer.headers) == binary


async def test_the_output_is_one_list_in_c_order_or_bytes(client):
    (await client.put("/v1/layers/plain", json={"num_features": 2, "affine": False, "eps": 1e-30})).raise_for_status()
    given = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    document, _ = split(await infer(client, "plain", given))
    assert document["outputs"][0]["data"] == [1, 2, 3, 4, 5, 6]
    assert document["outputs"][0]["shape"] == [1, 2, 3]
    _, content = split(await infer(client, "plain", given, parameters={"binary_data_output": True}))
    assert content == np.arange(1, 7, dtype="<f4").tobytes()


async def test_numbers_may_be_nested_as_the_shape_says(client, trained):
    nested = batch().tolist()
    expected = tensor_of(await infer(client, "bn", batch()))
    for data in (nested, [number for row in nested for number in row]):
        given = {"name": "input", "shape": [6, 2], "datatype": "FP32", "data": data}
        answer = await client.post("/v2/models/bn/infer", json={"inputs": [given]})
        assert torch.equal(tensor_of(answer), expected)


async def test_numbers_that_json_has_not(client):
    (await client.put("/v1/layers/any", json={"num_features": 2, "non_finite": "allow"})).raise_for_status()
    given = {"name": "input", "shape": [2, 2], "datatype": "FP32", "data": ["NaN", "Infinity", "-Infinity", 1]}
    document, _ = split(await client.post("/v2/models/any/infer", json={"inputs": [given]}))
    assert document["outputs"][0]["data"][:3] == ["NaN", "Infinity", "-Infinity"]


async def test_the_id_comes_back(client, trained):
    for given, binary in itertools.product(("42", "", 'Ünï"\\', "x" * 500), (True, False)):
        parameters = {"binary_data_output": binary}
        assert split(await infer(client, "bn", batch(), id=given, parameters=parameters))[0]["id"] == given
        assert "id" not in split(await infer(client, "bn", batch(), parameters=parameters))[0]


async def test_the_id_is_that_of_the_request(client, trained):
    """Requests that differ in their ids only are parsed once."""

    async def answered(members):
        body, headers = body_of(batch(), "FP32", binary=True)
        length = int(headers[LENGTH])
        head = b"{%b, %b" % (members, body[1:length])
        answer = await client.post(
            "/v2/models/bn/infer", content=head + body[length:], headers={LENGTH: str(len(head))}
        )
        return split(answer)[0].get("id") if answer.status_code == 200 else answer.status_code

    for number in range(3):
        assert await answered(b'"id": "%d"' % number) == str(number)
    for members, found in (
        (b'"id": "1", "model_name": "id"', "1"),
        (b'"id": "a", "id": "b"', "b"),
        (b'"id": "a", "id": ""', ""),
        (b'"id": "a", "i\\u0064": "b"', "b"),
        (b'"id": "", "id": "b"', "b"),
        (b'"model_name": "\\"id\\": \\"x\\"", "id": "y"', "y"),
        (b'"model_name": "\\"id\\": \\"x\\""', None),
        (b'"id": "\\u0041"', "A"),
        (b'"id": null', None),
        (b'"id": 5', 422),
        (b'"parameters": {"id": "x"}', 422),
    ):
        assert await answered(members) == found, members


async def test_an_empty_batch(client, trained):
    """As tritonclient sends it, and as kserve does: without the header, and with null for data."""
    empty = torch.empty((0, 2))
    kserves = {
        "name": "input",
        "shape": [0, 2],
        "datatype": "FP32",
        "parameters": {"binary_data_size": 0},
        "data": None,
    }
    for parameters in ({}, {"binary_data_output": True}):
        for answer in (
            await infer(client, "bn", empty, binary=True, parameters=parameters),
            await infer(client, "bn", empty, parameters=parameters),
            await client.post("/v2/models/bn/infer", json={"inputs": [kserves], "parameters": parameters}),
        ):
            assert tensor_of(answer).shape == (0, 2)


async def test_a_raw_binary_request(client, trained):
    """The body is the input: its free dimension follows from the length, and the output is binary."""
    for name, dtype in (("bn", torch.float32), ("wide", torch.float64)):
        given = batch(5, dtype)
        answer = await client.post(f"/v2/models/{name}/infer", content=raw(given), headers={LENGTH: "0"})
        assert LENGTH in answer.headers
        assert tensor_of(answer).shape == (5, 2)
        expected = await infer(client, name, given, "FP64" if name == "wide" else "FP32", binary=True)
        assert torch.equal(tensor_of(answer), tensor_of(expected))
    answer = await client.post("/v2/models/bn/infer", content=b"123", headers={LENGTH: "0"})
    assert (answer.status_code, "a multiple of 8 bytes" in answer.json()["error"]) == (400, True)
    await client.put("/v1/layers/images", json={"num_features": 2, "dimensions": 2})
    answer = await client.post("/v2/models/images/infer", content=bytes(32), headers={LENGTH: "0"})
    assert (answer.status_code, "[-1, 2, -1, -1]" in answer.json()["error"]) == (422, True)


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16"])
async def test_large_json_is_read_in_pieces(client, trained, monkeypatch, datatype):
    """What is small is read by one call of a parser; either way it is the same."""
    given = batch(20_000, TORCH[datatype])
    nested = {"name": "input", "shape": [20_000, 2], "datatype": datatype, "data": given.double().tolist()}
    as_bytes = tensor_of(await infer(client, "bn", given, datatype, binary=True))
    one_list = await infer(client, "bn", given, datatype, id="1")
    lists = await client.post("/v2/models/bn/infer", json={"inputs": [nested], "id": "1"})
    assert torch.equal(tensor_of(one_list), as_bytes)
    assert torch.equal(tensor_of(lists), as_bytes)


@pytest.mark.parametrize("binary", [True, False])
async def test_train_folds_once_for_each_key(client, binary):
    (await client.put("/v1/layers/bn", json={"num_features": 2})).raise_for_status()
    module = torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        expected = module(batch())
    train = {"parameters": {"mode": "train", "binary_data_output": True}}
    keyed = {"Idempotency-Key": "k"}
    first = await infer(client, "bn", batch(), binary=binary, headers=keyed, **train)
    again = await infer(client, "bn", batch(), binary=not binary, headers=keyed, **train)
    assert torch.equal(tensor_of(first), expected)
    assert torch.equal(tensor_of(again), expected)
    assert split(first)[0]["parameters"] == {"num_batches_tracked": 1}
    assert split(again)[0]["parameters"] == {"num_batches_tracked": 1, "idempotent_replay": True}
    assert again.headers["idempotent-replay"] == "true"
    # The key is that of train of V1 as well: it is the same operation.
    by_v1 = await client.post("/v1/layers/bn/train", json={"input": batch().tolist()}, headers=keyed)
    assert by_v1.headers.get("idempotent-replay") == "true"
    other = await infer(client, "bn", batch(4), binary=binary, headers=keyed, **train)
    assert (other.status_code, list(other.json())) == (422, ["error"])
    layer = (await client.get("/v1/layers/bn")).json()
    assert layer["num_batches_tracked"] == 1
    torch.testing.assert_close(torch.tensor(layer["running_mean"]), module.running_mean, rtol=0, atol=0)


async def test_kept_states(client, trained):
    """By the path and by the parameter, a version and a tag; the newest has moved on."""
    before = tensor_of(await infer(client, "bn", batch()))
    (await client.put("/v1/layers/bn/pins/ckpt-1", json={})).raise_for_status()
    await infer(client, "bn", batch(9), parameters={"mode": "train"})
    newest = await infer(client, "bn", batch())
    assert split(newest)[0]["model_version"] == "3"
    assert not torch.equal(tensor_of(newest), before)
    for at in ("ckpt-1", "2", 2):
        answers = [await infer(client, "bn", batch(), parameters={"at": at})]
        answers.append(await infer(client, "bn", batch(), version=at))
        answers.append(await infer(client, "bn", batch(), version=at, parameters={"mode": "eval"}, binary=True))
        for answer in answers:
            assert split(answer)[0]["model_version"] == "2"
            assert torch.equal(tensor_of(answer), before)


NOT_THERE = [
    ("bn/versions/9", {}, 404, "no version 9"),
    ("bn/versions/nightly", {}, 404, "no pin nightly"),
    ("bn/versions/-1", {}, 422, "'-1' is no version or tag"),
    ("bn/versions/%20", {}, 422, "' ' is no version or tag"),
    ("bn/versions/2", {"at": 2}, 422, "the path names a version already"),
    ("bn/versions/2", {"mode": "train"}, 422, "only the newest state can be trained"),
    ("bn", {"mode": "train", "at": 2}, 422, "only the newest state can be trained"),
    ("bn", {"at": "a b"}, 422, "'a b' is no version or tag"),
    ("bn", {"at": True}, 422, "parameters.at"),
    ("bn", {"at": 1.5}, 422, "parameters.at"),
    ("none", {}, 404, "there is no layer 'none'"),
    ("-", {}, 422, "'-' is no layer name"),
]


async def test_states_that_are_not_there(client, trained):
    for path, parameters, status, words in NOT_THERE:
        before = (await client.get("/v1/layers/bn")).json()
        body, _ = body_of(batch(), "FP32", binary=False, parameters=parameters)
        answer = await client.post(f"/v2/models/{path}/infer", content=body)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
        assert words in answer.json()["error"]
        assert (await client.get("/v1/layers/bn")).json() == before


async def test_it_is_the_operation_of_v1(client, trained, monkeypatch):
    """There is no second implementation: both come to the same coroutine."""
    called = []

    def noted(name):
        original = getattr(batches.Batches, name)

        async def call(self, *arguments, **options):
            called.append(name)
            return await original(self, *arguments, **options)

        return call

    for name in ("train", "eval"):
        monkeypatch.setattr(batches.Batches, name, noted(name))
    await infer(client, "bn", batch())
    await infer(client, "bn", batch(), parameters={"mode": "train"})
    assert called == ["eval", "train"]


async def test_what_clients_send_of_their_own_accord_is_accepted(client, trained):
    parameters = {"sequence_id": 7, "sequence_start": True, "sequence_end": False, "priority": 1, "timeout": 1000}
    given = {"name": "input", "shape": [1, 2], "datatype": "FP32", "data": [1, 2], "parameters": {"content_type": "np"}}
    document = {"model_name": "of a transformer", "inputs": [given], "parameters": parameters | {"content_type": "np"}}
    for headers in ({}, {"Content-Type": "application/octet-stream"}, {"Content-Type": "text/plain"}):
        content = json.dumps(document).encode()
        answer = await client.post("/v2/models/bn/infer", content=content, headers=headers)
        assert answer.status_code == 200, answer.text
