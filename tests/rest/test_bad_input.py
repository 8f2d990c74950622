"""Bad input: each has its problem type, and changes nothing."""

import io
import json
import re
from urllib.parse import unquote

import numpy as np
import pytest
from safetensors.numpy import save

from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS

pytestmark = pytest.mark.anyio

BATCH = np.array([[1, 2], [3, 4], [5, 9]], np.float32)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def safetensors(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


LYING_NPY = npy(BATCH).replace(b"(3, 2), }", b"(9, 2), }")
ENTRY = {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}

TRAIN = {
    "malformed JSON": (JSON, b'{"input": [[1, 2]', 400, "malformed-body"),
    "no JSON object": (JSON, b"[[1, 2]]", {400, 422}, None),
    "bare NaN in JSON": (JSON, b'{"input": [[NaN, 2], [3, 4]]}', 400, "malformed-body"),
    "empty body": (JSON, b"", 400, "malformed-body"),
    "ragged lists": (JSON, b'{"input": [[1, 2], [3]]}', 422, "shape-mismatch"),
    "wrong rank": (JSON, b'{"input": [1, 2]}', 422, "shape-mismatch"),
    "wrong C": (JSON, b'{"input": [[1, 2, 3], [4, 5, 6]]}', 422, "shape-mismatch"),
    "a string for a number": (JSON, b'{"input": [["one", 2], [3, 4]]}', {400, 422}, None),
    "an unknown tensor": (JSON, b'{"input": [[1, 2], [3, 4]], "extra": 1}', 422, "invalid-request"),
    "a missing tensor in JSON": (JSON, b"{}", 422, "invalid-request"),
    "NaN in JSON": (JSON, b'{"input": [["NaN", 2], [3, 4]]}', 422, "non-finite"),
    "empty batch": (NPY, npy(BATCH[:0]), 422, "too-few-values"),
    "one value per channel": (NPY, npy(BATCH[:1]), 422, "too-few-values"),
    "NaN batch": (NPY, npy(BATCH * np.nan), 422, "non-finite"),
    "integer input": (NPY, npy(BATCH.astype(np.int32)), 422, "dtype-mismatch"),
    "float64 input": (NPY, npy(BATCH.astype(np.float64)), 422, "dtype-mismatch"),
    "pickled .npy": (NPY, npy(np.array([{}], object), allow_pickle=True), {400, 422}, None),
    "Fortran .npy": (NPY, npy(np.asfortranarray(BATCH)), {400, 422}, None),
    "lying .npy": (NPY, LYING_NPY, 400, "malformed-body"),
    "no .npy": (NPY, b"PK", 400, "malformed-body"),
    "lying safetensors": (SAFETENSORS, safetensors({"input": ENTRY}, b"\0" * 8), 400, "malformed-body"),
    "huge safetensors header": (SAFETENSORS, b"\xff" * 16, 400, "malformed-body"),
    "missing tensor": (SAFETENSORS, save({}), 422, "invalid-request"),
    "other tensor": (SAFETENSORS, save({"inputs": BATCH}), 422, "invalid-request"),
    "wrong media type": ("text/csv", b"1,2", 415, "unsupported-media-type"),
    "wrong charset": ("application/json; charset=latin-1", b'{"input": [[1, 2], [3, 4]]}', 415, None),
    "too large": (NPY, b"\0" * 5000, 413, "payload-too-large"),
}


@pytest.mark.parametrize("case", TRAIN)
async def test_a_refused_batch_changes_nothing(serve, case):
    form, body, status, problem = TRAIN[case]
    async with serve(max_body_bytes=4096) as service, service.client() as client:
        await client.put("/v1/layers/bn", json={"num_features": 2})
        before = (await client.get("/v1/layers/bn")).json()
        answer = await client.post("/v1/layers/bn/train", content=body, headers={"Content-Type": form})
        check(answer, status, problem)
        assert (await client.get("/v1/layers/bn")).json() == before


def check(answer, status, problem):
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert answer.status_code == document["status"]
    assert answer.status_code in (status if isinstance(status, set) else {status}), document
    if problem:
        assert document["type"] == f"/problems/{problem}"
    assert document["title"]
    assert document["detail"]
    assert document["instance"].startswith("/v1/")


async def test_no_content_type_is_415(client, layer):
    answer = await client.post(f"{layer}/train", content=b"{}")
    check(answer, 415, "unsupported-media-type")
    assert answer.json()["expected"] == [JSON, NPY, SAFETENSORS]


async def test_a_compressed_body_is_415(client, layer):
    headers = {"Content-Type": JSON, "Content-Encoding": "gzip"}
    check(await client.post(f"{layer}/train", content=b"x", headers=headers), 415, "unsupported-media-type")


@pytest.mark.parametrize("body", ["[]", "null", "3", '"text"'])
async def test_a_config_that_is_no_object_is_malformed(client, body):
    answer = await client.put("/v1/layers/bn", content=body, headers={"Content-Type": JSON})
    check(answer, 400, "malformed-body")


@pytest.mark.parametrize("call", ["train", "eval"])
async def test_a_json_batch_without_rows(client, layer, call):
    answer = await client.post(f"{layer}/{call}", json={"input": []})
    if call == "train":
        check(answer, 422, "too-few-values")
    else:
        assert answer.json()["output"] == []


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "num_features"),
        ({"num_features": 0}, "num_features"),
        ({"num_features": True}, "num_features"),
        ({"num_features": 1.0}, "num_features"),
        ({"num_features": "1"}, "num_features"),
        ({"num_features": 1 << 21}, "num_features"),
        ({"num_features": 1, "eps": 0}, "eps"),
        ({"num_features": 1, "momentum": 2}, "momentum"),
        ({"num_features": 1, "channel_axis": 0}, "channel_axis"),
        ({"num_features": 1, "dimensions": 4}, "dimensions"),
        ({"num_features": 1, "dtype": "float16"}, "dtype"),
        ({"num_features": 1, "device": "tpu"}, "device"),
        ({"num_features": 1, "epsilon": 1}, "epsilon"),
    ],
)
async def test_a_bad_config_says_which_field(client, config, field):
    answer = await client.put("/v1/layers/bn", content=json.dumps(config), headers={"Content-Type": JSON})
    check(answer, 422, "invalid-request")
    assert answer.json()["field"] == field
    assert "expected" in answer.json()
    assert (await client.get("/v1/layers/bn")).status_code == 404


async def test_every_bad_field_is_listed(client):
    answer = await client.put("/v1/layers/bn", json={"num_features": 0, "eps": -1, "colour": "red"})
    assert [error["field"] for error in answer.json()["errors"]] == ["num_features", "eps", "colour"]
    assert all({"detail", "expected"} <= set(error) for error in answer.json()["errors"])


async def test_a_device_that_is_not_there(client):
    answer = await client.put("/v1/layers/bn", json={"num_features": 1, "device": "cuda:99"})
    check(answer, 422, "device-unavailable")


@pytest.mark.parametrize(
    ("update", "field"),
    [
        ({"eps": None}, "eps"),
        ({"num_features": 3}, "num_features"),
        ({"weight": ["one", 2]}, "weight.0"),
        ({"weight": [1, 2], "bias": None}, "bias"),
    ],
)
async def test_a_bad_update_changes_nothing(client, layer, update, field):
    before = (await client.get(layer)).json()
    answer = await client.patch(layer, json=update)
    check(answer, 422, None)
    assert answer.json()["field"] == field
    assert (await client.get(layer)).json() == before


@pytest.mark.parametrize(
    "case",
    [
        ("PUT", "", "text/plain", b"{}", 415, "unsupported-media-type"),
        ("PUT", "", "application/merge-patch+json", b"{}", 415, "unsupported-media-type"),
        ("PUT", "", JSON, b"", 400, "malformed-body"),
        ("PUT", "", JSON, b'{"num_features": 1', 400, "malformed-body"),
        ("PATCH", "", "application/x-www-form-urlencoded", b"eps=1", 415, "unsupported-media-type"),
        ("PATCH", "", JSON, b"", 400, "malformed-body"),
        ("PATCH", "", JSON, b'{"weight": [1, 2, 3]}', 422, "shape-mismatch"),
        ("POST", "/reset", "text/plain", b"all", 415, "unsupported-media-type"),
        ("POST", "/reset", JSON, b'{"what": "everything"}', 422, "invalid-request"),
        ("POST", "/reset", JSON, b"[" * 100_000, 400, "malformed-body"),
        ("PUT", "/state", NPY, npy(BATCH), 415, "unsupported-media-type"),
        ("PUT", "/state", JSON, b'{"running_mean": [1, 2, 3]}', 422, "shape-mismatch"),
        ("PUT", "/state", JSON, b'{"momentum": 1}', 422, "invalid-request"),
        ("PUT", "/state", SAFETENSORS, save({"weight": BATCH[0].astype(np.float64)}), 422, "dtype-mismatch"),
        ("PUT", "/state", SAFETENSORS, save({"weight": BATCH}), 422, "shape-mismatch"),
    ],
)
async def test_a_refused_document_changes_nothing(client, layer, case):
    method, call, form, body, status, problem = case
    before = (await client.get(layer)).json()
    answer = await client.request(method, layer + call, content=body, headers={"Content-Type": form})
    check(answer, status, problem)
    assert (await client.get(layer)).json() == before


LAYER_CALLS = [
    ("GET", ""),
    ("HEAD", ""),
    ("PUT", ""),
    ("PATCH", ""),
    ("DELETE", ""),
    ("POST", "/reset"),
    ("GET", "/state"),
    ("PUT", "/state"),
    ("POST", "/train"),
    ("POST", "/eval"),
    ("POST", "/inverse"),
    ("POST", "/backward"),
    ("POST", "/moments"),
]


@pytest.mark.parametrize(
    "name", ["a%2Fb", ".hidden", "-x", "a%20b", "%C3%A9", "a" * 201, "a%00", "a%0A", "%2e%2e", "a!"]
)
async def test_a_bad_name_is_refused_on_every_method(client, name):
    for method, call in LAYER_CALLS:
        answer = await client.request(method, f"/v1/layers/{name}{call}")
        assert answer.status_code == 422, (method, call)
        if method != "HEAD":
            check(answer, 422, "invalid-request")
            assert answer.json()["field"] == "name"


@pytest.mark.parametrize(
    ("path", "repeated"),
    [
        ("a%20b", "'a b'"),
        ("%C3%A9%0A", r"'\xe9\n'"),
        ("a" * 80 + "!", "'" + "a" * 77 + "...'"),
        ("%00" * 1000, "'" + r"\x00" * 77 + "...'"),
    ],
)
async def test_a_bad_name_is_repeated(client, path, repeated):
    """Whoever makes names in a program has to see which one it was; escaped, and no longer than a line."""
    answer = await client.get(f"/v1/layers/{path}")
    assert answer.json()["detail"].startswith(f"{repeated} is no layer name: 1 to 200 letters")
    assert len(answer.json()["got"]) <= 200
    many = {"layers": {unquote(path): {"count": 2, "mean": [1], "var": [1]}}}
    (result,) = (await client.post("/v1/moments", json=many)).json()["layers"].values()
    assert result["detail"] == answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "form", "body"),
    [
        ("GET", "/" + "x" * 50_000, JSON, b""),
        ("PUT", "/v1/layers/bn", JSON, b'{"num_features": 1, "%s": 1}' % (b"x" * 50_000)),
        ("POST", "/v1/moments", JSON, b'{"%s": 1}' % (b"x" * 50_000)),
        ("POST", "/v1/moments", SAFETENSORS, save({"x" * 50_000: np.ones(1, "f4")})),
        ("PUT", "layer1.0.bn1/state", SAFETENSORS, save({"x" * 50_000: np.ones(1, "f4")})),
    ],
    ids=["path", "field", "layers", "tensor", "state"],
)
async def test_what_is_not_known_is_repeated_in_part(client, layer, method, path, form, body):
    url = path if path.startswith("/") else layer.replace("layer1.0.bn1", path)
    answer = await client.request(method, url, content=body, headers={"Content-Type": form})
    assert 400 <= answer.status_code < 500
    document = answer.json()
    assert len(json.dumps({name: value for name, value in document.items() if name != "instance"})) < 1500


@pytest.mark.parametrize("call", ["train", "eval", "moments", "state"])
async def test_too_large_a_body_names_the_setting_and_a_way_without_it(serve, call):
    async with serve(max_body_bytes=2048) as service, service.client() as client:
        method, body = "PUT" if call == "state" else "POST", {"input": [[1] * 2048]}
        answer = await client.request(method, f"/v1/layers/bn/{call}", json=body)
    check(answer, 413, "payload-too-large")
    assert "BATCHNORM_MAX_BODY_BYTES" in answer.json()["detail"]
    assert "train_local" in answer.json()["detail"]
    assert answer.json()["expected"] == 2048


async def test_a_good_name_may_be_escaped(client, layer):
    escaped = layer.replace("layer1.0", "%6Cayer1%2E0").replace("/layers/", "/%6cayers/")
    assert (await client.get(escaped)).json()["name"] == "layer1.0.bn1"


async def test_unknown_query_parameters_are_refused_everywhere(client):
    others = ["/v1/layers", "/healthz", "/readyz", "/problems", "/problems/not-found", "/openapi.json", "/docs"]
    calls = [(method, f"/v1/layers/bn{call}") for method, call in LAYER_CALLS if method != "HEAD"]
    for method, path in [*calls, ("POST", "/v1/moments"), *(("GET", path) for path in others)]:
        answer = await client.request(method, f"{path}?colour=red", json={"num_features": 1})
        assert (answer.status_code, answer.json()["field"]) == (422, "colour"), (method, path)
        assert isinstance(answer.json()["expected"], list)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=ten", "limit"),
        ("limit=1&limit=2", "limit"),
        ("limit", "query"),
        ("prefix=%ff", "query"),
        ("prefix=" + "a" * 201, "prefix"),
    ],
)
async def test_bad_query_parameters(client, query, field):
    answer = await client.get(f"/v1/layers?{query}")
    check(answer, 422, "invalid-request")
    assert answer.json()["field"] == field


async def test_numbers_in_queries_are_written_in_decimal_digits(client):
    """Seen: `limit=+3`, `before=1_0` and a space were accepted. Of every operation that OpenAPI lists."""
    document = (await client.get("/openapi.json")).json()
    found = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", ()):
                schema = parameter.get("schema", {})
                types = {each.get("type") for each in (schema, *schema.get("anyOf", ()))}
                if parameter["in"] != "query" or not types & {"integer", "number"}:
                    continue
                name = parameter["name"]
                found.add(name)
                url = re.sub(r"\{\w+\}", "bn", path)
                for lenient in ["%2B3", "1_0", "%203", "3%20", "%D9%A3", "0x3", "3."] + ["3.0"] * ("integer" in types):
                    answer = await client.request(method, f"{url}?{name}={lenient}", json={})
                    check(answer, 422, "invalid-request")
                    assert answer.json()["field"] == name, (url, lenient)
                    assert "decimal digits" in answer.json()["expected"]
                answer = await client.request(method, f"{url}?{name}=3", json={})
                assert answer.json().get("field") != name or "together" in answer.json()["detail"], url
    assert found == {"limit", "before", "size", "timeout", "wait"}


@pytest.mark.parametrize(
    "query", ["statistics=yes", "statistics=", "statistics=true&statistics=true", "Statistics=true"]
)
async def test_bad_query_parameters_of_hot_calls(client, layer, query):
    answer = await client.post(f"{layer}/train?{query}", json={"input": [[1, 2], [3, 4]]})
    check(answer, 422, "invalid-request")
    assert (await client.get(layer)).json()["version"] == 2


@pytest.mark.parametrize("call", ["train", "reset"])
@pytest.mark.parametrize("key", ["", "a b", "a" * 201, "\xe9", "a\tb"])
async def test_a_bad_key_is_refused(client, layer, call, key):
    headers = {"Idempotency-Key": key.encode("latin-1"), "Content-Type": NPY}
    content = npy(BATCH) if call == "train" else b""
    answer = await client.post(f"{layer}/{call}", content=content, headers=headers)
    check(answer, 422, "invalid-request")
    assert answer.json()["field"] == "Idempotency-Key"
    assert (await client.get(layer)).json()["version"] == 2


async def test_a_key_where_none_is_taken_is_ignored(client, layer):
    answer = await client.post(f"{layer}/eval", json={"input": [[1, 2]]}, headers={"Idempotency-Key": "a b"})
    assert answer.status_code == 200


async def test_a_key_of_another_batch_is_refused(client, layer):
    headers = {"Idempotency-Key": "k"}
    (await client.post(f"{layer}/train", json={"input": [[1, 2], [3, 4]]}, headers=headers)).raise_for_status()
    before = (await client.get(layer)).json()
    answer = await client.post(f"{layer}/train", json={"input": [[1, 2], [3, 5]]}, headers=headers)
    check(answer, 422, "idempotency-key-reused")
    assert (await client.get(layer)).json() == before


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "image/*, text/plain"])
async def test_an_answer_that_nobody_takes_changes_nothing(client, layer, accept):
    answer = await client.post(f"{layer}/train", json={"input": [[1, 2], [3, 4]]}, headers={"Accept": accept})
    check(answer, 406, "not-acceptable")
    assert (await client.get(layer)).json()["version"] == 2


async def test_too_many_layers(serve):
    async with serve(max_layers=1) as service, service.client() as client:
        await client.put("/v1/layers/a", json={"num_features": 1})
        answer = await client.put("/v1/layers/b", json={"num_features": 1})
        check(answer, 409, "too-many-layers")
