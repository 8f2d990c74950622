"""The server, its layers as models, their index, and their statistics."""

import contextlib

import pytest

from batchnorm_service import __version__
from batchnorm_service.layers import Layers
from batchnorm_service.open_inference import server
from batchnorm_service.open_inference.statistics import Statistics
from batchnorm_service.tokens import Scope, add_token
from telemetry.reading import by, metrics

from .conftest import batch, infer, split

pytestmark = pytest.mark.anyio


@pytest.fixture
async def pinned(client):
    """A layer whose second state of three is pinned, under two tags."""
    (await client.put("/v1/layers/bn", json={"num_features": 2})).raise_for_status()
    await infer(client, "bn", batch(), parameters={"mode": "train"})
    for tag in ("second", "first"):
        (await client.put(f"/v1/layers/bn/pins/{tag}", json={})).raise_for_status()
    await infer(client, "bn", batch(), parameters={"mode": "train"})


async def test_the_server(client):
    assert (await client.get("/v2")).json() == {
        "name": "batchnorm-service",
        "version": __version__,
        "extensions": ["binary_tensor_data", "parameters", "statistics", "model_repository(index)"],
    }
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    # The specification names the member `live`; KServe's client reads `ready`.
    assert (await client.get("/v2/health/ready")).json() == {"live": True, "ready": True}


CONFIGS = [
    ({}, "FP32", [-1, 3]),
    ({"dtype": "float64"}, "FP64", [-1, 3]),
    ({"dimensions": 1}, "FP32", [-1, 3]),
    ({"dimensions": 2}, "FP32", [-1, 3, -1, -1]),
    ({"dimensions": 3}, "FP32", [-1, 3, -1, -1, -1]),
    ({"channel_axis": -1}, "FP32", [-1, 3]),
    ({"channel_axis": 3}, "FP32", [-1, -1, -1, 3]),
    ({"channel_axis": -2}, "FP32", [-1, 3, -1]),
    ({"dimensions": 2, "channel_axis": -1}, "FP32", [-1, -1, -1, 3]),
]


async def test_metadata(client):
    for config, datatype, shape in CONFIGS:
        await client.delete("/v1/layers/bn")
        (await client.put("/v1/layers/bn", json={"num_features": 3, **config})).raise_for_status()
        tensor = {"datatype": datatype, "shape": shape}
        assert (await client.get("/v2/models/bn")).json() == {
            "name": "bn",
            "versions": [version := str((await client.get("/v1/layers/bn")).json()["version"])],
            "platform": "pytorch_batchnorm",
            "inputs": [{"name": "input", **tensor}],
            "outputs": [{"name": "output", **tensor}],
        }
        # A batch of that shape is taken.
        ones = {"name": "input", "datatype": datatype, "shape": [3 if n == 3 else 1 for n in shape], "data": [1, 2, 3]}
        assert split(await client.post("/v2/models/bn/infer", json={"inputs": [ones]}))[0]["model_version"] == version


async def test_versions(client, pinned):
    """Each that is listed can be asked for, and evaluated with."""
    versions = (await client.get("/v2/models/bn")).json()["versions"]
    assert versions == ["3", "2", "first", "second"]
    for version in versions:
        metadata = (await client.get(f"/v2/models/bn/versions/{version}")).json()
        assert (metadata["name"], metadata["versions"]) == ("bn", versions)
        assert (await client.get(f"/v2/models/bn/versions/{version}/ready")).json() == {"name": "bn", "ready": True}
        assert (await infer(client, "bn", batch(), version=version)).status_code == 200
    assert (await client.get("/v2/models/bn/versions/1/ready")).status_code == 404


async def test_a_layer_is_ready(client):
    assert (await client.get("/v2/models/bn/ready")).status_code == 404
    (await client.put("/v1/layers/bn", json={"num_features": 3})).raise_for_status()
    assert (await client.get("/v2/models/bn/ready")).json() == {"name": "bn", "ready": True}


async def test_the_index(client, monkeypatch):
    monkeypatch.setattr(server, "_PAGE", 2)  # more than one page is read
    for body in (None, b"", b"{}", b'{"ready": true}', b'{"ready": false}'):
        assert (await client.post("/v2/repository/index", content=body)).json() == []
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        (await client.put(f"/v1/layers/{name}", json={"num_features": 2})).raise_for_status()
    await infer(client, "b", batch(), parameters={"mode": "train"})
    assert (await client.post("/v2/repository/index")).json() == [
        {"name": name, "version": "2" if name == "b" else "1", "state": "READY", "reason": ""} for name in names
    ]
    monkeypatch.setattr(server, "_MOST", 4)
    refused = await client.post("/v2/repository/index")
    assert (refused.status_code, "GET /v1/layers" in refused.json()["error"]) == (413, True)


async def test_a_token_of_a_prefix_sees_its_layers_only(serve, tmp_path):
    tokens = {prefix: add_token(tmp_path / "tokens", Scope.ADMIN, prefix)[0] for prefix in ("", "a.", "z.")}
    async with contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(serve(tokens_file=tmp_path / "tokens"))
        clients = {
            prefix: await stack.enter_async_context(service.client(authorization=f"Bearer {token}"))
            for prefix, token in tokens.items()
        }
        for name in ("a.1", "a.2", "b.1"):
            (await clients[""].put(f"/v1/layers/{name}", json={"num_features": 2})).raise_for_status()
        for prefix, seen in (("", ["a.1", "a.2", "b.1"]), ("a.", ["a.1", "a.2"]), ("z.", [])):
            index = (await clients[prefix].post("/v2/repository/index")).json()
            assert [layer["name"] for layer in index] == seen
        # A layer outside answers as one that is not there, in every call: tests/rest/test_prefixes.py.
        answer = await infer(clients["a."], "b.1", batch())
        assert (answer.status_code, "no layer 'b.1'" in answer.json()["error"]) == (404, True)


async def test_statistics_count_the_calls_made(client):
    for name in ("bn", "other"):
        (await client.put(f"/v1/layers/{name}", json={"num_features": 2})).raise_for_status()
    nothing = (await client.get("/v2/models/bn/stats")).json()["model_stats"][0]
    assert (nothing["inference_count"], nothing["execution_count"], nothing["last_inference"]) == (0, 0, 0)
    for rows in (3, 4):
        await infer(client, "bn", batch(rows))
        await infer(client, "bn", batch(rows), binary=True, parameters={"mode": "train"})
    assert (await infer(client, "bn", batch(1), parameters={"mode": "train"})).status_code == 422
    assert (await infer(client, "bn", batch(1), "FP64")).status_code == 422
    assert (await client.post("/v2/models/bn/infer", content=b"{")).status_code == 400
    assert (await infer(client, "none", batch())).status_code == 404
    await infer(client, "other", batch(5))
    (found,) = (await client.get("/v2/models/bn/stats")).json()["model_stats"]
    assert (found["name"], found["version"], found["inference_count"], found["execution_count"]) == ("bn", "3", 14, 4)
    stages = found["inference_stats"]
    counts = {name: stage["count"] for name, stage in stages.items()}
    assert counts == {
        **dict.fromkeys(("success", "queue", "compute_input", "compute_infer", "compute_output"), 4),
        **{"fail": 3, "cache_hit": 0, "cache_miss": 0},
    }
    assert stages["success"]["ns"] == sum(stages[f"compute_{stage}"]["ns"] for stage in ("input", "infer", "output"))
    assert all(stages[name]["ns"] > 0 for name in ("fail", "compute_input", "compute_infer", "compute_output"))
    assert found["last_inference"] > 1_700_000_000_000
    (other,) = (await client.get("/v2/models/other/stats")).json()["model_stats"]
    assert other["inference_count"] == 5


async def test_statistics_are_of_so_many_layers(service):
    """Clients choose names, and layers come and go: those that were used last are kept."""
    statistics = Statistics(Layers(service.store), most=2)
    times = (0, 1, 2, 3)
    statistics.fail("no layer", 1, exists=False)
    for name in ("a", "b", "a", "c"):
        statistics.succeed(name, 1, times)
    statistics.fail("b", 1, exists=False)
    assert [*statistics._counts] == ["a", "c"]
    assert statistics._counts["a"].successes == 2


async def test_every_call_is_in_the_metrics(client):
    """By its route: a layer's name is no label."""
    (await client.put("/v1/layers/bn", json={"num_features": 2})).raise_for_status()
    await infer(client, "bn", batch())
    await infer(client, "bn", batch(), binary=True)
    await infer(client, "bn", batch(), version="1")
    await infer(client, "none", batch())
    await client.get("/v2/models/bn")
    found = by(await metrics(client), "batchnorm_requests_total", "method", "route", "outcome")
    assert {labels: count for labels, count in found.items() if count and labels[1].startswith("/v2")} == {
        ("POST", "/v2/models/{name}/infer", "2xx"): 2,
        ("POST", "/v2/models/{name}/infer", "layer-not-found"): 1,
        ("POST", "/v2/models/{name}/versions/{version}/infer", "2xx"): 1,
        ("GET", "/v2/models/{name}", "2xx"): 1,
    }
