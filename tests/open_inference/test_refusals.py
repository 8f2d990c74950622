"""What is refused: with the protocol's form of an error on every route, and nothing changed."""

import json
from itertools import product

import pytest

from batchnorm_client.wire.errors import Overloaded, StoreUnavailable
from batchnorm_service.layers import Layers
from fast_path.running import answer as read_answer

from .conftest import LENGTH, batch, body_of, infer, raw

pytestmark = pytest.mark.anyio

GIVEN = {"name": "input", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4]}
OF_BYTES = {"name": "input", "shape": [2, 2], "datatype": "FP32", "parameters": {"binary_data_size": 16}}


@pytest.fixture
async def untouched(client):
    """A layer that must be as it was at the end."""
    (await client.put("/v1/layers/bn", json={"num_features": 2})).raise_for_status()
    before = (await client.get("/v1/layers/bn")).json()
    yield
    assert (await client.get("/v1/layers/bn")).json() == before


def error(answer, status):
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
    assert answer.headers["x-request-id"]
    (name,) = document = answer.json()
    assert name == "error"
    return document["error"]


def changed(given=GIVEN, **members):
    return {key: value for key, value in {**given, **members}.items() if value is not ...}


def request(given=GIVEN, **members):
    return {"inputs": [given], **members}


DOCUMENTS = {
    "no object": ([], 400, "the body must be a JSON object"),
    "no inputs": ({}, 422, "inputs: is missing"),
    "an empty list of inputs": ({"inputs": []}, 422, "inputs: List should have at least 1 item"),
    "two inputs": ({"inputs": [GIVEN, GIVEN]}, 422, "inputs: List should have at most 1 item"),
    "an unknown field": (request(model="bn"), 422, "model: is not known; known are id, model_name"),
    "an unknown parameter": (request(parameters={"moed": "train"}), 422, "known are mode, at, binary_data_output"),
    "another mode": (request(parameters={"mode": "test"}), 422, "'eval' or 'train'"),
    "a number for a bool": (request(parameters={"binary_data_output": 1}), 422, "parameters.binary_data_output"),
    "a number for the id": (request(id=42), 422, "id: Input should be a valid string"),
    "another input": (request(changed(name="x")), 422, "inputs.0.name: Input should be 'input'"),
    "two mistakes": (request(changed(name="x"), id=42), 422, "valid string; inputs.0.name: Input should be 'input'"),
    "another output": (request(outputs=[{"name": "y"}]), 422, "outputs.0.name: Input should be 'output'"),
    "two outputs": (request(outputs=[{"name": "output"}] * 2), 422, "outputs: List should have at most 1 item"),
    "a class count": (
        request(outputs=[{"name": "output", "parameters": {"classification": 3}}]),
        422,
        "outputs.0.parameters.classification: is not known; known are binary_data",
    ),
    "shared memory": (
        request(changed(data=..., parameters={"shared_memory_region": "r", "shared_memory_byte_size": 16})),
        422,
        "inputs.0.parameters.shared_memory_region: is not known; known are binary_data_size",
    ),
    "an unknown field of the input": (request(changed(dtype="FP32")), 422, "known are name, shape, datatype"),
    "another data type": (request(changed(datatype="INT64")), 422, "'FP16', 'BF16', 'FP32' or 'FP64'"),
    "a data type in small letters": (request(changed(datatype="fp32")), 422, "inputs.0.datatype"),
    "the layer's other data type": (request(changed(datatype="FP64")), 422, "float64"),
    "no shape": (request(changed(shape=...)), 422, "inputs.0.shape: is missing"),
    "a negative dimension": (request(changed(shape=[-1, 2])), 422, "inputs.0.shape.0"),
    "a fractional dimension": (request(changed(shape=[2.0, 2])), 422, "inputs.0.shape.0"),
    "a dimension that is true": (request(changed(shape=[True, 2])), 422, "inputs.0.shape.0"),
    "a shape of text": (request(changed(shape="2,2")), 422, "inputs.0.shape"),
    "too many dimensions": (request(changed(shape=[1] * 65)), 422, "inputs.0.shape"),
    "a shape no address space has": (request(changed(shape=[1 << 40, 1 << 40])), 400, "too large"),
    "no data": (request(changed(data=...)), 422, "inputs.0.data: is missing"),
    "fewer numbers": (request(changed(data=[1, 2, 3])), 422, "the shape is [2, 2]; data has [3]"),
    "another nesting": (request(changed(data=[[1, 2, 3, 4]])), 422, "the shape is [2, 2]; data has [1, 4]"),
    "ragged lists": (request(changed(data=[[1, 2], [3]])), 422, "ragged"),
    "text for a number": (request(changed(data=[1, 2, 3, "x"])), 422, "the string 'x' is not a number"),
    "null for a number": (request(changed(data=[1, 2, 3, None])), 422, "null is not a number"),
    "true for a number": (request(changed(data=[1, 2, 3, True])), 422, "true is not a number"),
    "a number for the list": (request(changed(data=5)), 422, "the shape is [2, 2]; data has []"),
    "too large for FP32": (request(changed(data=[1, 2, 3, 1e39])), 422, "1e+39 does not fit float32"),
    "too large for FP16": (request(changed(datatype="FP16", data=[1, 2, 3, 65520])), 422, "does not fit float16"),
    "too large for BF16": (request(changed(datatype="BF16", data=[1, 2, 3, 3.4e38])), 422, "does not fit bfloat16"),
    "data and bytes": (request(changed(OF_BYTES, data=[1, 2, 3, 4])), 422, "send one of them"),
    "bytes without the header": (request(OF_BYTES), 400, "declares 16 bytes of tensors"),
    "channels": (request(changed(shape=[2, 3], data=[1] * 6)), 422, "must have 2 channels"),
    "one dimension": (request(changed(shape=[4])), 422, "input must have"),
    "a size that no byte pays for": (request(changed(shape=[1 << 30, 2, 0], data=[])), 413, "BATCHNORM_MAX_ELEMENTS"),
}


async def test_a_json_object_that_is_wrong(client, untouched):
    """In one test, as a service for each case would take many times as long."""
    for (case, (document, status, words)), mode in product(DOCUMENTS.items(), ("eval", "train")):
        sent = document
        if isinstance(document, dict):
            sent = document | {"parameters": {"mode": mode} | document.get("parameters", {})}
        assert words in error(await client.post("/v2/models/bn/infer", json=sent), status), case


SIZES = [
    (request(OF_BYTES), bytes(15), None, 400, "declares 16 bytes of tensors"),
    (request(OF_BYTES), bytes(17), None, 400, "declares 16 bytes of tensors"),
    (request(OF_BYTES), b"", None, 400, "declares 16 bytes of tensors"),
    (request(GIVEN), b"x", None, 400, "declares 0 bytes of tensors"),
    (request(changed(OF_BYTES, parameters={"binary_data_size": 15})), bytes(15), None, 400, "FP32 of shape [2, 2]"),
    (request(changed(OF_BYTES, parameters={"binary_data_size": -1})), b"", None, 422, "binary_data_size"),
    (request(changed(OF_BYTES, shape=[1 << 62, 2])), bytes(16), None, 400, "too large"),
    (request(changed(OF_BYTES, shape=[1 << 31, 2])), bytes(16), None, 400, "has 17179869184 bytes"),
    (request(OF_BYTES), bytes(16), "9999", 400, f"{LENGTH} is 9999; the body has"),
    (request(OF_BYTES), bytes(16), "5", 400, "not JSON"),
    (request(OF_BYTES), bytes(16), "-1", 400, "must be a number of bytes"),
    (request(OF_BYTES), bytes(16), "1e2", 400, "must be a number of bytes"),
    (request(OF_BYTES), bytes(16), "", 400, "must be a number of bytes"),
    (request(OF_BYTES), bytes(16), "9" * 19, 400, "must be a number of bytes"),
]


async def test_sizes_that_are_wrong(client, untouched):
    for head, content, length, status, words in SIZES:
        text = json.dumps(head).encode()
        headers = {LENGTH: str(len(text)) if length is None else length}
        answer = await client.post("/v2/models/bn/infer", content=text + content, headers=headers)
        assert words in error(answer, status), (head, len(content), length)


async def test_the_length_is_given_once(client, untouched):
    body, headers = body_of(batch(), "FP32", binary=True)
    twice = [*headers.items(), *headers.items()]
    assert "given once" in error(await client.post("/v2/models/bn/infer", content=body, headers=twice), 400)


SPOILED = [
    (b"[[", b"[", 400, "not JSON"),
    (b"2], [", b"2, ", 422, "ragged"),
    (b"2], [", b"2]; [", 400, "not JSON"),
    (b"0.5", b"null", 422, "null is not a number"),
    (b"0.5", b"1e39", 422, "does not fit float32"),
    (b'"data": [[0.5', b'"data": [[1]], "data": [[0.5, 1', 422, "ragged"),
    (b'"data"', b'"d\\u0061ta": [], "x"', 422, "inputs.0.x: is not known"),
    (b"]}]}", b"]}]", 400, "not JSON"),
    (b"]}]}", b"]}]}]", 400, "not JSON"),
]


async def test_large_json_that_is_wrong(client, untouched):
    """It is not read by one call of a parser; that must not be seen."""
    text = json.dumps(request(changed(shape=[4000, 2], data=[[0.5, 2]] * 4000))).encode()
    assert (await client.post("/v2/models/bn/infer", content=text)).status_code == 200
    for there, instead, status, words in SPOILED:
        assert there in text
        answer = await client.post("/v2/models/bn/infer", content=text.replace(there, instead, 1))
        assert words in error(answer, status), (there, instead)


async def test_very_many_members_are_not_looked_at(client, untouched):
    """Seen: 130,000 unknown parameters took 0.7 s, because each was described."""
    many = {f"k{number}": 1 for number in range(20_000)}
    for document in (request(parameters=many), request(**many), request(changed(**many))):
        answer = await client.post("/v2/models/bn/infer", json=document)
        assert "more than 1000 members" in error(answer, 422)


async def test_of_a_key_that_is_there_twice_the_last_counts(client, untouched):
    """As in all JSON that the service reads."""
    data = json.dumps([0.5, 2] * 4000)
    given = f'{{"name": "input", "shape": [4000, 2], "datatype": "FP32", "data": [1], "data": {data}}}'
    assert (await client.post("/v2/models/bn/infer", content=f'{{"inputs": [{given}]}}')).status_code == 200
    given = f'{{"name": "input", "shape": [1, 2], "datatype": "FP32", "data": {data}, "data": [1, 2]}}'
    assert (await client.post("/v2/models/bn/infer", content=f'{{"inputs": [{given}]}}')).status_code == 200


async def test_compressed_bodies_are_refused(client, untouched):
    body, headers = body_of(batch(), "FP32", binary=True)
    for path, encoding in product(("/v2/models/bn/infer", "/v2/repository/index"), ("gzip", "deflate")):
        answer = await client.post(path, content=body, headers=headers | {"Content-Encoding": encoding})
        assert "compressed" in error(answer, 415)


async def test_a_web_page_of_another_origin_cannot_train(client, untouched):
    """A browser does not ask before it sends these content types, or none; and of the others, it is refused here."""
    body, _ = body_of(batch(), "FP32", binary=False, parameters={"mode": "train"})
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        answer = await client.post("/v2/models/bn/infer", content=body, headers={"Origin": "http://evil"} | headers)
        error(answer, 403)
    error(await client.options("/v2/models/bn/infer", headers={"Origin": "http://evil"}), 405)


ROUTES = [
    ("GET", "/v2/", 404, "nothing at '/v2/'"),
    ("GET", "/v2/models", 404, "nothing at"),
    ("GET", "/v2/models/bn/config", 404, "nothing at"),
    ("GET", "/v2/models//ready", 404, "nothing at"),
    ("GET", "/v2/health", 404, "nothing at"),
    ("GET", "/v2/health/well", 404, "nothing at"),
    ("POST", "/v2/repository/models/bn/load", 404, "nothing at"),
    ("POST", "/v2/repository/models/bn/unload", 404, "nothing at"),
    ("GET", "/v2/systemsharedmemory/status", 404, "nothing at"),
    ("GET", "/v2/logging", 404, "nothing at"),
    ("POST", "/v2", 405, "takes GET, HEAD, not POST"),
    ("POST", "/v2/health/live", 405, "takes GET, HEAD, not POST"),
    ("GET", "/v2/models/bn/infer", 405, "takes POST, not GET"),
    ("GET", "/v2/models/bn/versions/1/infer", 405, "takes POST, not GET"),
    ("POST", "/v2/models/bn", 405, "takes GET, HEAD, not POST"),
    ("DELETE", "/v2/models/bn", 405, "takes GET, HEAD, not DELETE"),
    ("GET", "/v2/repository/index", 405, "takes POST, not GET"),
    ("GET", "/v2?x=1", 422, "x: is not known"),
    ("GET", "/v2/models/bn?x=1", 422, "x: is not known"),
    ("GET", "/v2/models/bn/stats?x=1", 422, "x: is not known"),
    ("POST", "/v2/models/bn/infer?at=1", 422, "at: is not known"),
    ("GET", "/v2/models/-bn", 422, "is no layer name"),
    ("GET", "/v2/models/none", 404, "there is no layer 'none'"),
    ("GET", "/v2/models/none/ready", 404, "there is no layer 'none'"),
    ("GET", "/v2/models/none/stats", 404, "there is no layer 'none'"),
    ("GET", "/v2/models/bn/versions/9", 404, "no version 9"),
    ("GET", "/v2/models/bn/versions/9/ready", 404, "no version 9"),
    ("GET", "/v2/models/bn/versions/a%20b/ready", 422, "is no version or tag"),
    ("POST", "/v2/repository/index", 422, "known are ready"),
]


async def test_every_route_has_the_protocols_form_of_errors(client, untouched):
    for method, path, status, words in ROUTES:
        answer = await client.request(method, path, json={"x": 1} if method == "POST" else None)
        assert words in error(answer, status), (method, path)
        assert ("allow" in answer.headers) == (status == 405)


async def test_limits(serve):
    async with serve(max_body_bytes=1024, max_elements=100) as service, service.client() as client:
        (await client.put("/v1/layers/bn", json={"num_features": 2})).raise_for_status()
        assert "BATCHNORM_MAX_BODY_BYTES" in error(await infer(client, "bn", batch(200)), 413)
        assert "BATCHNORM_MAX_BODY_BYTES" in error(await infer(client, "bn", batch(200), binary=True), 413)
        assert "BATCHNORM_MAX_ELEMENTS" in error(await infer(client, "bn", batch(51), binary=True), 413)
        assert (await infer(client, "bn", batch(50), binary=True)).status_code == 200
        too_large = await client.post("/v2/repository/index", content=bytes(1025))
        assert "BATCHNORM_MAX_BODY_BYTES" in error(too_large, 413)


async def test_too_much_at_a_time(client, service, monkeypatch, untouched):
    monkeypatch.setattr(service.gateway.shares, "enter", lambda _: Overloaded("too many", retry_after=1))
    for answer in (await infer(client, "bn", batch()), await client.get("/v2/models/bn")):
        assert error(answer, 503) == "too many"
        assert answer.headers["retry-after"] == "1"
    assert (await client.get("/v2/health/live")).status_code == 200  # health is asked for all the more then
    assert (await client.get("/v2/health/ready")).status_code == 200
    monkeypatch.undo()


async def test_the_store_does_not_answer(client, monkeypatch, untouched):
    async def ping(_self):
        raise StoreUnavailable("the store does not answer: gone", retry_after=1)

    monkeypatch.setattr(Layers, "ping", ping)
    assert "gone" in error(await client.get("/v2/health/ready"), 503)
    assert (await client.get("/v2/health/live")).json() == {"live": True}


async def test_what_breaks_inside_is_not_told(client, monkeypatch, untouched):
    async def get(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(Layers, "get", get)
    assert "secret" not in error(await client.get("/v2/models/bn"), 500)
    monkeypatch.undo()


async def test_a_train_call_needs_the_scope_train(serve):
    async with serve(token="full", read_token="look") as service:
        async with service.client(authorization="Bearer full") as full:
            (await full.put("/v1/layers/bn", json={"num_features": 2})).raise_for_status()
            before = (await full.get("/v1/layers/bn")).json()
            async with service.client(authorization="Bearer look") as look:
                for binary in (True, False):
                    assert (await infer(look, "bn", batch(), binary=binary)).status_code == 200
                    refused = await infer(look, "bn", batch(), binary=binary, parameters={"mode": "train"})
                    assert "needs a token with the scope train; this one has read" in error(refused, 403)
            assert (await full.get("/v1/layers/bn")).json() == before
            assert (await infer(full, "bn", batch(), parameters={"mode": "train"})).status_code == 200
        async with service.client() as nobody:
            for path in ("/v2", "/v2/health/live", "/v2/health/ready"):
                assert (await nobody.get(path)).status_code == 200
            refused = await infer(nobody, "bn", batch())
            assert "Authorization: Bearer" in error(refused, 401)
            assert refused.headers["www-authenticate"] == "Bearer"
            error(await nobody.get("/v2/unknown"), 401)


@pytest.mark.parametrize("way", ["fast path"], indirect=True)
async def test_a_head_that_is_too_large(serve):
    """It is refused before there is a request; all that is known of it then is the beginning of its path."""
    async with serve(max_header_bytes=2000, max_url_bytes=512) as service:
        for head in (
            b"POST /v2/models/bn/infer HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 3000,
            b"GET /v2/models/" + b"x" * 600 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        ):
            reader, writer = await service.connect()
            writer.write(head)
            status, _, body = await read_answer(reader)
            writer.close()
            assert (status, "than the" in json.loads(body)["error"]) == (413, True)


async def test_bytes_are_not_looked_at_before_their_sizes_are(client, untouched):
    """A dimension of zero has no bytes, whatever the others are."""
    given = {"name": "input", "shape": [1 << 40, 2, 0], "datatype": "FP32", "parameters": {"binary_data_size": 0}}
    body = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    answer = await client.post("/v2/models/bn/infer", content=body, headers={LENGTH: str(len(body))})
    assert "BATCHNORM_MAX_ELEMENTS" in error(answer, 413)
    assert raw(batch()) != b""
