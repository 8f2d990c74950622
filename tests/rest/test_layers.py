"""Layers as resources."""

import pytest

from batchnorm_client.wire.documents import Layer, LayerPage

pytestmark = pytest.mark.anyio


async def test_create_answers_the_layer(client):
    answer = await client.put("/v1/layers/bn", json={"num_features": 3, "eps": 0.5})
    assert answer.status_code == 201
    assert answer.headers["location"] == "/v1/layers/bn"
    layer = Layer.model_validate_json(answer.content)
    assert answer.headers["etag"] == f'"{layer.version}"'
    assert layer.config.eps == 0.5
    assert layer.running_var == layer.weight == [1.0, 1.0, 1.0]
    assert layer.running_mean == layer.bias == [0.0, 0.0, 0.0]
    assert (layer.num_batches_tracked, layer.samples_tracked) == (0, 0)


async def test_create_again_with_the_same_config_is_harmless(client, layer):
    (await client.patch(layer, json={"eps": 0.25})).raise_for_status()
    answer = await client.put(layer, json={"num_features": 2, "momentum": 0.1})
    assert answer.status_code == 200
    assert answer.json()["num_batches_tracked"] == 1
    assert answer.json()["config"]["eps"] == 0.25


async def test_create_with_another_config_is_refused(client, layer):
    answer = await client.put(layer, json={"num_features": 3})
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/layer-exists")


async def test_tensors_that_the_config_leaves_out_are_null(client):
    answer = await client.put(
        "/v1/layers/bare", json={"num_features": 1, "affine": False, "track_running_stats": False}
    )
    document = answer.json()
    assert [document[name] for name in ("weight", "bias", "running_mean", "running_var")] == [None] * 4


async def test_charset_utf_8_is_accepted(client):
    answer = await client.put(
        "/v1/layers/bn", content=b'{"num_features": 1}', headers={"Content-Type": 'Application/JSON; charset="UTF-8"'}
    )
    assert answer.status_code == 201


async def test_list_pages_by_name(client):
    for name in ("b", "a", "a.1", "a.2", "c"):
        await client.put(f"/v1/layers/{name}", json={"num_features": 4})
    page = LayerPage.model_validate_json((await client.get("/v1/layers")).content)
    assert [layer.name for layer in page.layers] == ["a", "a.1", "a.2", "b", "c"]
    assert page.next is None
    assert page.layers[0].num_features == 4
    first = (await client.get("/v1/layers?prefix=a&limit=2")).json()
    assert [layer["name"] for layer in first["layers"]] == ["a", "a.1"]
    rest = (await client.get("/v1/layers", params={"prefix": "a", "after": first["next"]})).json()
    assert ([layer["name"] for layer in rest["layers"]], rest["next"]) == (["a.2"], None)


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_a_missing_layer_is_404(client, method):
    answer = await client.request(method, "/v1/layers/none", **({"json": {}} if method == "PATCH" else {}))
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/layer-not-found")


async def test_head_is_get_without_a_body(client, layer):
    get, head = await client.get(layer), await client.head(layer)
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["etag"] == get.headers["etag"]
    assert head.headers["content-length"] == get.headers["content-length"]


async def test_patch_sets_what_is_given(client, layer):
    answer = await client.patch(
        layer,
        content=b'{"momentum": null, "weight": [2, "NaN"]}',
        headers={"Content-Type": "application/merge-patch+json"},
    )
    assert answer.status_code == 200
    assert answer.json()["config"]["momentum"] is None
    assert answer.json()["weight"] == [2.0, "NaN"]
    assert answer.json()["bias"] == [0.0, 0.0]
    refused = await client.post(f"{layer}/train", json={"input": [[1, 2], [3, 4]]})
    assert (refused.status_code, refused.json()["field"]) == (422, "weight")  # not "input"


async def test_a_long_vector_is_parsed_in_a_thread(client):
    await client.put("/v1/layers/wide", json={"num_features": 50_000})
    answer = await client.patch("/v1/layers/wide", json={"weight": [0.5] * 50_000})
    assert answer.status_code == 200
    assert answer.json()["weight"] == [0.5] * 50_000


async def test_delete_then_create_has_a_larger_version(client, layer):
    version = (await client.get(layer)).json()["version"]
    answer = await client.delete(layer)
    assert (answer.status_code, answer.content) == (204, b"")
    assert "content-length" not in answer.headers
    assert (await client.get(layer)).status_code == 404
    assert (await client.put(layer, json={"num_features": 2})).json()["version"] > version


async def test_reset(client, layer):
    (await client.patch(layer, json={"weight": [2, 2]})).raise_for_status()
    document = (await client.post(f"{layer}/reset")).json()
    assert (document["num_batches_tracked"], document["running_mean"]) == (0, [0, 0])
    assert document["weight"] == [2, 2]
    document = (await client.post(f"{layer}/reset", json={"what": "parameters"})).json()
    assert document["weight"] == [1, 1]


async def test_reset_with_a_key_is_done_once(client, layer):
    first = await client.post(f"{layer}/reset", headers={"Idempotency-Key": "k"})
    await client.post(f"{layer}/train", json={"input": [[1, 2], [3, 4]]})
    again = await client.post(f"{layer}/reset", headers={"Idempotency-Key": "k"})
    assert "idempotent-replay" not in first.headers
    assert again.headers["idempotent-replay"] == "true"
    assert again.json()["version"] == first.json()["version"]
    assert (await client.get(layer)).json()["num_batches_tracked"] == 1
