"""The states of several layers in one safetensors file."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load, save

from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_service.tokens import Scope, add_token

pytestmark = pytest.mark.anyio

ORDER = ["running_mean", "running_var", "weight", "bias", "num_batches_tracked"]


def versions_of(body):
    header = json.loads(body[8 : 8 + struct.unpack("<Q", body[:8])[0]])
    return json.loads(header["__metadata__"]["versions"])


@pytest.fixture
async def net(client):
    """Three layers of a net, one of which was trained, and one that is not part of it."""
    for name in ("net.a", "net.b", "net.c", "other"):
        (await client.put(f"/v1/layers/{name}", json={"num_features": 2})).raise_for_status()
    (await client.post("/v1/layers/net.b/train", json={"input": [[1, 2], [3, 6]]})).raise_for_status()


async def put(client, tensors, versions=None, **headers):
    metadata = None if versions is None else {"versions": json.dumps(versions)}
    content = save({name: np.asarray(value) for name, value in tensors.items()}, metadata)
    return await client.put("/v1/state", content=content, headers={"Content-Type": SAFETENSORS, **headers})


@pytest.mark.parametrize("query", ["prefix=net.", "names=net.a,net.b,net.c", "names=net.c,net.a,net.b"])
async def test_the_tensors_of_several_layers(client, net, query):
    answer = await client.get(f"/v1/state?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, SAFETENSORS)
    found = load(answer.content)
    assert set(found) == {f"net.{layer}.{tensor}" for layer in "abc" for tensor in ORDER}
    for name in ("net.a", "net.b", "net.c"):
        alone = load((await client.get(f"/v1/layers/{name}/state")).content)
        assert all((found[f"{name}.{tensor}"] == alone[tensor]).all() for tensor in ORDER)
    assert found["net.b.running_mean"].tolist() == pytest.approx([0.2, 0.4])
    assert versions_of(answer.content) == {"net.a": 1, "net.b": 2, "net.c": 1}


async def test_the_etag_is_that_of_the_states(client, net):
    tags = {(await client.get(f"/v1/state?{query}")).headers["etag"] for query in ("prefix=net.", "prefix=o")}
    assert len(tags) == 2
    tag = (await client.get("/v1/state?prefix=net.")).headers["etag"]
    assert tag in tags
    for query in ("prefix=net.", "names=net.c,net.b,net.a"):
        answer = await client.get(f"/v1/state?{query}", headers={"If-None-Match": tag})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    await client.post("/v1/layers/net.a/train", json={"input": [[1, 2], [3, 6]]})
    changed = await client.get("/v1/state?prefix=net.", headers={"If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag
    await client.put("/v1/layers/net.d", json={"num_features": 2})
    assert (await client.get("/v1/state?prefix=net.")).headers["etag"] != changed.headers["etag"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "names"),
        ("?names=", "names"),
        ("?prefix=", "prefix"),
        ("?prefix=net.&names=net.a", "names"),
        ("?names=net.a,,net.b", "name"),
        ("?names=net.a,net.a", "names"),
        ("?names=net.a&wait=60.1", "wait"),
        ("?names=net.a&wait=-1", "wait"),
        ("?names=net.a&wait=nan", "wait"),
        ("?names=net.a&at=1", "at"),
    ],
)
async def test_what_is_refused(client, net, query, field):
    answer = await client.get(f"/v1/state{query}")
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request")
    assert answer.json()["field"] == field


async def test_layers_that_do_not_exist(client, net):
    answer = await client.get("/v1/state?names=net.a,net.x")
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/layer-not-found")
    assert answer.json()["got"] == "net.x"
    none = await client.get("/v1/state?prefix=nothing")
    assert (none.status_code, load(none.content), versions_of(none.content)) == (200, {}, {})


async def test_the_form(client, net):
    answer = await client.get("/v1/state?names=net.a", headers={"Accept": "application/json"})
    assert answer.status_code == 406
    answer = await client.put("/v1/state", json={})
    assert answer.status_code == 415


async def test_more_than_the_largest_body(serve):
    async with serve(max_body_bytes=4096) as service, service.client() as client:
        for name in ("a", "b", "c"):
            await client.put(f"/v1/layers/{name}", json={"num_features": 120})  # 1,928 bytes and a header of 450
        two = await client.get("/v1/state?names=a,b")
        assert two.status_code == 413
        assert two.json()["expected"] == 4096
        assert two.json()["got"] > 4096
        assert (await client.get("/v1/state?names=a")).status_code == 200
        assert (await client.get("/v1/state?names=a")).status_code == 200  # the refusal is not kept
        refused = await put(client, {"a.weight": np.ones(1025, "f4")})
        assert refused.status_code == 413


async def test_replacing_the_tensors_of_several_layers(client, net):
    before = load((await client.get("/v1/state?prefix=net.")).content)
    answer = await put(
        client,
        {
            "net.a.weight": np.full(2, 5, "f4"),
            "net.b.running_mean": np.full(2, 7, "f4"),
            "net.b.running_var": np.full(2, -1, "f4"),
            "net.c.bias": np.zeros(3, "f4"),
            "net.x.bias": np.zeros(2, "f4"),
            "net.a.bias": np.full(2, 6, "f4"),
            "other.nothing": np.zeros(2, "f4"),
            "a/b.bias": np.zeros(2, "f4"),
        },
    )
    assert answer.status_code == 200
    results = answer.json()["layers"]
    assert results.pop("net.a") == {"version": 2, "num_batches_tracked": 0}
    assert {name: (result["type"], result["field"]) for name, result in results.items()} == {
        "net.b": ("/problems/invalid-request", "running_var"),
        "net.c": ("/problems/shape-mismatch", "bias"),
        "net.x": ("/problems/layer-not-found", "name"),
        "other": ("/problems/invalid-request", "nothing"),
        "a/b": ("/problems/invalid-request", "name"),
    }
    after = await client.get("/v1/state?prefix=net.")
    assert versions_of(after.content) == {"net.a": 2, "net.b": 2, "net.c": 1}
    changed = {name for name, tensor in load(after.content).items() if (tensor != before[name]).any()}
    assert changed == {"net.a.weight", "net.a.bias"}
    assert load(after.content)["net.a.weight"].tolist() == [5, 5]


async def test_versions_are_preconditions_of_their_layers(client, net):
    tensors = {"net.a.bias": np.ones(2, "f4"), "net.b.bias": np.ones(2, "f4"), "net.c.bias": np.ones(2, "f4")}
    results = (await put(client, tensors, {"net.a": 1, "net.b": 1})).json()["layers"]
    assert (results["net.a"]["version"], results["net.c"]["version"]) == (2, 2)
    problem = results["net.b"]
    assert (problem["type"], problem["expected"], problem["got"]) == ("/problems/version-mismatch", 2, [1])


async def test_what_was_read_can_be_put_back(client, net):
    answer = await client.get("/v1/state?prefix=net.")
    back = await client.put("/v1/state", content=answer.content, headers={"Content-Type": SAFETENSORS})
    assert {name: result["version"] for name, result in back.json()["layers"].items()} == {
        "net.a": 2,
        "net.b": 3,
        "net.c": 2,
    }
    again = await client.put("/v1/state", content=answer.content, headers={"Content-Type": SAFETENSORS})
    assert {result["status"] for result in again.json()["layers"].values()} == {412}


async def test_if_match_is_for_all_layers_of_the_file(client, net):
    tag = (await client.get("/v1/state?names=net.a,net.b")).headers["etag"]
    tensors = {"net.a.bias": np.ones(2, "f4"), "net.b.bias": np.ones(2, "f4")}
    wrong = await put(client, tensors, **{"If-Match": '"00000000000000000000000000000000"'})
    assert (wrong.status_code, wrong.json()["type"]) == (412, "/problems/version-mismatch")
    assert f'"{wrong.json()["expected"]}"' == tag
    right = await put(client, tensors, {"net.b": 1}, **{"If-Match": tag})
    assert right.json()["layers"]["net.a"] == {"version": 2, "num_batches_tracked": 0}
    assert right.json()["layers"]["net.b"]["status"] == 412
    assert (await put(client, tensors, **{"If-Match": tag})).status_code == 412
    assert (await put(client, tensors, **{"If-Match": "*"})).status_code == 200


@pytest.mark.parametrize(
    ("tensors", "versions", "field"),
    [
        ({}, None, "state"),
        ({"bias": np.ones(2, "f4")}, None, "bias"),
        ({"net.a.bias": np.ones(2, "f4")}, [1], "__metadata__.versions"),
        ({"net.a.bias": np.ones(2, "f4")}, {"net.a": "1"}, "__metadata__.versions"),
        ({"net.a.bias": np.ones(2, "f4")}, {"net.a": True}, "__metadata__.versions"),
    ],
)
async def test_files_that_are_refused(client, net, tensors, versions, field):
    answer = await put(client, tensors, versions)
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request")
    assert answer.json()["field"] == field
    assert versions_of((await client.get("/v1/state?names=net.a")).content) == {"net.a": 1}


async def test_a_version_without_a_tensor_has_a_result(client, net):
    result = (await put(client, {}, {"net.a": 1})).json()["layers"]["net.a"]
    assert (result["type"], result["field"]) == ("/problems/invalid-request", "state")


async def test_parameters_count_as_a_batch_in_the_history_and_statistics_do_not(client, net):
    for value in range(5):
        await put(client, {"net.a.weight": np.full(2, value, "f4")})
    await put(client, {"net.a.running_mean": np.ones(2, "f4")})
    history = (await client.get("/v1/layers/net.a/history")).json()["history"]
    assert [(entry["version"], entry["operation"]) for entry in history] == [(7, "replace"), (6, "update")]


async def test_tokens_with_a_prefix_see_their_layers_only(serve, tmp_path):
    path = tmp_path / "tokens"
    bound, admin = add_token(path, Scope.TRAIN, "team1.")[0], add_token(path, Scope.ADMIN, "")[0]
    async with (
        serve(tokens_file=path) as service,
        service.client(authorization=f"Bearer {bound}") as mine,
        service.client(authorization=f"Bearer {admin}") as everything,
    ):
        for name in ("team1.a", "team2.a"):
            await everything.put(f"/v1/layers/{name}", json={"num_features": 2})
        for query in ("prefix=team1.", "prefix=t", "names=team1.a"):
            assert versions_of((await mine.get(f"/v1/state?{query}")).content) == {"team1.a": 1}
        tag = (await mine.get("/v1/state?prefix=t")).headers["etag"]
        assert versions_of((await mine.get("/v1/state?prefix=team2.")).content) == {}
        refused = await mine.get("/v1/state?names=team1.a,team2.a")
        missing = await mine.get("/v1/state?names=team1.a,team2.b")
        assert (refused.status_code, refused.json()["detail"].replace("team2.a", "team2.b")) == (
            404,
            missing.json()["detail"],
        )
        results = (await put(mine, {"team1.a.bias": np.ones(2, "f4"), "team2.a.bias": np.ones(2, "f4")})).json()
        assert results["layers"]["team1.a"]["version"] == 2
        assert results["layers"]["team2.a"]["type"] == "/problems/layer-not-found"
        changed = (await mine.get("/v1/state?prefix=t")).headers["etag"]
        assert changed != tag
        await put(everything, {"team2.a.bias": np.ones(2, "f4")})
        assert (await mine.get("/v1/state?prefix=t")).headers["etag"] == changed
