"""Batches whose bytes do not tell how large they are: refused by their shape, before anything is allocated."""

import asyncio
import json
import struct

import numpy as np
import pytest

pytestmark = pytest.mark.anyio

JSON, NPY, SAFETENSORS = "application/json", "application/x-npy", "application/vnd.safetensors"
HUGE = [2**40, 1, 0]
MOST_IN_JSON = 2**20


def safetensors(**shapes):
    """A file of tensors without elements."""
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def npy(shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {tuple(shape)}}}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def body(form, shape):
    return npy(shape) if form == NPY else safetensors(input=shape)


@pytest.fixture
async def layer(client):
    """A layer with one channel, trained once."""
    url = "/v1/layers/one"
    (await client.put(url, json={"num_features": 1})).raise_for_status()
    (await client.post(f"{url}/train", json={"input": [[1], [3]]})).raise_for_status()
    return url


async def refused(client, url, content, form, accept=JSON):
    before = (await client.get(url.partition("?")[0].rpartition("/")[0])).json()
    answer = await client.post(url, content=content, headers={"Content-Type": form, "Accept": accept})
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (413, "/problems/payload-too-large")
    assert "BATCHNORM_MAX_ELEMENTS" in problem["detail"]
    assert (await client.get(url.partition("?")[0].rpartition("/")[0])).json() == before
    return problem


@pytest.mark.parametrize("form", [NPY, SAFETENSORS])
@pytest.mark.parametrize("call", ["eval", "inverse", "train", "eval?statistics=true", "train?group=g&size=2"])
async def test_a_shape_that_no_byte_pays_for_is_refused(client, layer, call, form):
    for accept in [JSON, SAFETENSORS] if "statistics" in call else [JSON, NPY, SAFETENSORS]:
        problem = await refused(client, f"{layer}/{call}", body(form, HUGE), form, accept)
        assert (problem["expected"], problem["got"], problem["field"]) == (2**25, 2**40, "input"), accept


@pytest.mark.parametrize("call", ["backward?mode=eval", "backward?mode=train", "backward?mode=train&group=g&size=2"])
@pytest.mark.parametrize("accept", [JSON, SAFETENSORS])
@pytest.mark.parametrize("field", ["input", "grad_output"])
async def test_both_tensors_of_a_backward_pass(client, layer, call, accept, field):
    shapes = {"input": [0, 1], "grad_output": [0, 1]} | {field: HUGE}
    problem = await refused(client, f"{layer}/{call}", safetensors(**shapes), SAFETENSORS, accept)
    assert problem["field"] == field


@pytest.mark.parametrize("call", ["eval", "inverse"])
@pytest.mark.parametrize("shape", [[MOST_IN_JSON + 1, 1, 0], [0, 1, MOST_IN_JSON + 1], [2**10, 1, 2**10, 2, 0]])
async def test_json_has_a_limit_of_its_own(client, layer, call, shape):
    """Of what other forms carry in a few bytes."""
    problem = await refused(client, f"{layer}/{call}", body(SAFETENSORS, shape), SAFETENSORS)
    assert problem["expected"] == MOST_IN_JSON
    for form in (NPY, SAFETENSORS):
        answer = await client.post(f"{layer}/{call}", content=body(form, shape), headers={"Content-Type": form})
        assert answer.status_code == 200
        assert len(answer.content) < 200


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([MOST_IN_JSON, 1, 0], "[" + ",".join(["[[]]"] * MOST_IN_JSON) + "]"),
        ([0, 1, MOST_IN_JSON], "[]"),
        ([2, 1, 0, 7], "[[[]],[[]]]"),
        ([0, 1], "[]"),
    ],
    ids=["as many as there may be", "none outside", "inside", "usual"],
)
async def test_an_empty_batch_within_the_limit_is_written(client, layer, shape, text):
    headers = {"Content-Type": SAFETENSORS, "Accept": JSON}
    answer = await client.post(f"{layer}/eval", content=body(SAFETENSORS, shape), headers=headers)
    assert answer.status_code == 200
    assert answer.text.startswith(f'{{"output":{text},"version":')


async def test_lists_of_empty_lists_in_a_request(client, layer):
    text = f'{{"input": [{",".join(["[]"] * (MOST_IN_JSON + 1))}]}}'.encode()
    problem = await refused(client, f"{layer}/eval", text, JSON, SAFETENSORS)
    assert (problem["expected"], problem["got"]) == (MOST_IN_JSON, MOST_IN_JSON + 1)


async def test_dimensions_of_one_that_json_would_write_as_lists(client, layer):
    """2^20 rows of 62 dimensions: orjson would take 40 GB for the first, and the text of the second has 2 GB."""
    rows, ones = 2**20, [1] * 61
    problem = await refused(client, f"{layer}/eval", body(SAFETENSORS, [rows, *ones, 0]), SAFETENSORS)
    assert "lists" in problem["detail"]
    full = np.zeros(2**23, np.float16)
    header = {"input": {"dtype": "F16", "shape": [2**23, *ones], "data_offsets": [0, full.nbytes]}}
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + full.tobytes()
    problem = await refused(client, f"{layer}/eval", content, SAFETENSORS)
    assert "lists" in problem["detail"]


async def test_the_setting_bounds_every_batch(serve):
    async with serve(max_elements=12) as service, service.client() as client:
        (await client.put("/v1/layers/a", json={"num_features": 3})).raise_for_status()
        for rows, status in ((4, 200), (5, 413)):
            for call in ("train", "eval", "inverse"):
                answer = await client.post(f"/v1/layers/a/{call}", json={"input": np.eye(rows, 3).tolist()})
                assert answer.status_code == status
        async with asyncio.timeout(10):
            shards = (
                client.post("/v1/layers/a/train?group=g&size=2", json={"input": np.eye(rows, 3).tolist()})
                for rows in (4, 4)
            )
            assert [answer.status_code for answer in await asyncio.gather(*shards)] == [200, 200]


async def test_half_of_the_body_limit_is_the_default(serve):
    """Each element takes two bytes or more, also in JSON: no batch with bytes is refused by it."""
    async with serve(max_body_bytes=4096) as service, service.client() as client:
        (await client.put("/v1/layers/a", json={"num_features": 1})).raise_for_status()
        for elements, status in ((2048, 200), (2049, 413)):
            content = body(SAFETENSORS, [elements, 1, 0])
            answer = await client.post("/v1/layers/a/eval", content=content, headers={"Content-Type": SAFETENSORS})
            assert answer.status_code == status
        half = np.zeros((1900, 1), np.float16)
        header = json.dumps({"input": {"dtype": "F16", "shape": [1900, 1], "data_offsets": [0, half.nbytes]}}).encode()
        content = struct.pack("<Q", len(header)) + header + half.tobytes()
        answer = await client.post("/v1/layers/a/eval", content=content, headers={"Content-Type": SAFETENSORS})
        assert answer.status_code == 200


@pytest.mark.parametrize("accept", [JSON, SAFETENSORS])
async def test_tensors_that_are_no_batches_have_one_shape_and_no_other(client, layer, accept):
    headers = {"Content-Type": SAFETENSORS, "Accept": accept}
    moments = safetensors(mean=HUGE, var=HUGE).replace(b'"F32"', b'"F64"')
    count = safetensors(count=HUGE, mean=[0], var=[0]).replace(b'"F32"', b'"I64"')
    for content in (moments, count):
        assert (await client.post(f"{layer}/moments", content=content, headers=headers)).status_code == 422
        many = (
            content.replace(b'"count"', b'"one/count"')
            .replace(b'"mean"', b'"one/mean"')
            .replace(b'"var"', b'"one/var"')
        )
        length = struct.pack("<Q", len(many) - 8)
        answer = await client.post("/v1/moments", content=length + many[8:], headers=headers)
        assert answer.json()["layers"]["one"]["status"] == 422
    for name in ("weight", "running_mean", "num_batches_tracked"):
        content = safetensors(**{name: HUGE})
        assert (await client.put(f"{layer}/state", content=content, headers=headers)).status_code == 422
