"""Kept states, rollback, pins and digests (shared/http-api.md, "History, rollback, pins, digests")."""

import hashlib
import struct
from datetime import datetime

import numpy as np
import pytest
import torch

from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_client.wire.tensors import decode_safetensors

pytestmark = pytest.mark.anyio

BATCHES = [[[1, 2], [3, 4], [5, 9]], [[-2, 0], [8, 1]], [[0.5, 7], [1, 1], [2, 2], [9, 0]]]


@pytest.fixture
async def every_batch(serve):
    """A service that keeps a state before every batch."""
    async with serve(history_seconds=0) as service, service.client() as client:
        yield client


async def made(client, name="bn", **config):
    url = f"/v1/layers/{name}"
    (await client.put(url, json={"num_features": 2} | config)).raise_for_status()
    return url


async def train(client, url, batch):
    answer = await client.post(f"{url}/train", json={"input": batch})
    answer.raise_for_status()
    return answer.json()["version"]


async def get(client, url, **params):
    answer = await client.get(url, params=params)
    answer.raise_for_status()
    return answer.json()


async def history(client, url, **params):
    return (await get(client, f"{url}/history", **params))["history"]


def problem(answer):
    return answer.status_code, answer.json()["type"].removeprefix("/problems/")


def expected_digest(layer):
    """The bytes that the contract names, built here from a `Layer` document."""
    config = layer["config"]
    parts = [b"batchnorm-state-1\n", config["dtype"].encode(), b"\n", str(config["channel_axis"]).encode(), b"\n"]
    parts.append(struct.pack("<d", config["eps"]))
    parts.append(b"\0" if config["clip"] is None else b"\1" + struct.pack("<d", config["clip"]))
    for name in ("running_mean", "running_var", "weight", "bias"):
        if layer[name] is None:
            parts.append(b"\0")
        else:
            values = np.array(layer[name], config["dtype"])
            parts += [b"\1", struct.pack("<Q", len(values)), values.astype(values.dtype.newbyteorder("<")).tobytes()]
    return "sha-256:" + hashlib.sha256(b"".join(parts)).hexdigest()


async def test_the_contracts_digest(client):
    url = await made(client)
    answer = await client.put(f"{url}/state", json={"running_mean": [0.5, -1], "running_var": [1, 2]})
    assert answer.json()["digest"] == "sha-256:33c31163ba28b680a6d047289347f9c8bb25805fa5c67e579b50e63edfb3fb16"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"dtype": "float64", "channel_axis": -1, "clip": 2.5},
        {"affine": False},
        {"track_running_stats": False},
        {"statistics": "population", "eps": 0.25},
    ],
    ids=str,
)
async def test_digests_of_all_kinds_of_layers(client, config):
    url = await made(client, **config)
    before = (await get(client, url))["digest"]
    await train(client, url, BATCHES[0])
    layer = await get(client, url)
    assert layer["digest"] == expected_digest(layer)
    assert (layer["digest"] == before) == (config.get("track_running_stats") is False)
    for call in ("eval", "inverse") if config.get("track_running_stats", True) else ("eval",):
        answer = await client.post(f"{url}/{call}", json={"input": BATCHES[0]})
        assert answer.headers["batchnorm-digest"] == layer["digest"], call
    assert (await client.get(f"{url}/state")).headers["batchnorm-digest"] == layer["digest"]
    assert "batchnorm-digest" not in (await client.post(f"{url}/train", json={"input": BATCHES[0]})).headers


async def test_what_is_kept(client):
    """While batches come, one state a minute; before anything else that changes a layer, the state as it was."""
    url = await made(client)
    assert [entry["operation"] for entry in await history(client, url)] == ["create"]
    for batch in BATCHES:
        await train(client, url, batch)
    await client.patch(url, json={"weight": [2, 2]})
    assert [entry["operation"] for entry in await history(client, url)] == ["update"]
    for change in (
        client.post(f"{url}/reset", json={}),
        client.put(f"{url}/state", json={"bias": [1, 1]}),
        client.patch(url, json={"eps": 0.5}),
        client.patch(url, json={"eps": 0.25, "weight": [3, 3]}),
    ):
        (await change).raise_for_status()
    entries = await history(client, url)
    assert [entry["operation"] for entry in entries] == ["update", "update", "replace", "reset", "update"]
    assert [entry["num_batches_tracked"] for entry in entries] == [0, 0, 0, 0, 3]
    assert [entry["samples_tracked"] for entry in entries] == [0, 0, 0, 0, 9]
    versions = [entry["version"] for entry in entries]
    assert versions == sorted(versions, reverse=True)
    times = [datetime.fromisoformat(entry["at"]) for entry in entries]
    assert times == sorted(times, reverse=True)


async def test_every_kept_state_is_as_it_was(every_batch):
    client, url = every_batch, await made(every_batch)
    states = [await get(client, url)]
    outputs = [(await client.post(f"{url}/eval", json={"input": BATCHES[1]})).json()]
    for batch in BATCHES:
        await train(client, url, batch)
        states.append(await get(client, url))
        outputs.append((await client.post(f"{url}/eval", json={"input": BATCHES[1]})).json())
    entries = await history(client, url)
    assert [entry["digest"] for entry in entries] == [state["digest"] for state in reversed(states)]
    for state, output in zip(states, outputs, strict=True):
        version = state["version"]
        assert await get(client, url, at=version) == state
        assert (await client.post(f"{url}/eval?at={version}", json={"input": BATCHES[1]})).json() == output
        answer = await client.get(f"{url}/state", params={"at": version})
        tensors, _ = decode_safetensors(bytearray(answer.content))
        assert tensors["running_mean"].numpy().tolist() == np.float32(state["running_mean"]).tolist()
        back = await client.post(f"{url}/inverse?at={version}", json={"input": output["output"]})
        np.testing.assert_allclose(back.json()["output"], BATCHES[1], rtol=1e-5, atol=1e-5)


async def test_pages(every_batch):
    client, url = every_batch, await made(every_batch)
    for batch in BATCHES:
        await train(client, url, batch)
    entries = await history(client, url)
    assert len(entries) == 4
    first = await get(client, f"{url}/history", limit=3)
    assert first["history"] == entries[:3]
    rest = await get(client, f"{url}/history", limit=3, before=first["next"])
    assert (rest["history"], rest["next"]) == (entries[3:], None)
    assert await history(client, url, before=entries[-1]["version"]) == []


async def test_only_the_last_ones_stay(serve):
    async with serve(history_seconds=0, history_length=2) as service, service.client() as client:
        url = await made(client)
        versions = [await train(client, url, batch) for batch in (*BATCHES, *BATCHES)]
        assert [entry["version"] for entry in await history(client, url)] == versions[:-4:-1]
        gone = versions[-4]
        for answer in (
            await client.get(url, params={"at": gone}),
            await client.get(f"{url}/state", params={"at": gone}),
            await client.post(f"{url}/eval?at={gone}", json={"input": BATCHES[0]}),
            await client.post(f"{url}/inverse?at={gone}", json={"input": BATCHES[0]}),
            await client.post(f"{url}/rollback", json={"version": gone}),
            await client.put(f"{url}/pins/late", json={"version": gone}),
            await client.get(url, params={"at": "no-such-tag"}),
        ):
            assert problem(answer) == (404, "version-not-found")
            assert answer.json()["field"] == ("at" if "at=" in str(answer.request.url) else "version")


async def test_history_can_be_turned_off(serve):
    async with serve(history_length=0, history_seconds=0) as service, service.client() as client:
        url = await made(client)
        await train(client, url, BATCHES[0])
        pin = (await client.put(f"{url}/pins/a", json={})).json()
        await client.post(f"{url}/reset", json={})
        await train(client, url, BATCHES[1])
        assert len(await history(client, url)) == 2, "the newest and the pinned one"
        await client.delete(f"{url}/pins/a")
        assert problem(await client.get(url, params={"at": pin["version"]})) == (404, "version-not-found")
        assert len(await history(client, url)) == 1


async def test_rollback_undoes_a_poisoned_batch(every_batch):
    client, url = every_batch, await made(every_batch)
    module = torch.nn.BatchNorm1d(2)
    for batch in BATCHES[:2]:
        await train(client, url, batch)
        module(torch.tensor(batch, dtype=torch.float32))
    good = await get(client, url)
    await train(client, url, [[1e12, 0], [-1e12, 5]])
    await client.patch(url, json={"eps": 0.5, "weight": [7, 7]})
    answer = await client.post(f"{url}/rollback", json={"version": good["version"]})
    back = answer.json()
    newest = await history(client, url, limit=1)
    assert answer.headers["etag"] == f'"{back["version"]}"'
    assert back["version"] > good["version"] + 2
    changed = ("version", "updated_at")
    assert {key: value for key, value in back.items() if key not in changed} == {
        key: value for key, value in good.items() if key not in changed
    }
    assert newest[0]["operation"] == "rollback"
    await train(client, url, BATCHES[2])
    module(torch.tensor(BATCHES[2], dtype=torch.float32))
    after = await get(client, url)
    assert np.float32(after["running_mean"]).tolist() == module.running_mean.tolist()
    assert after["num_batches_tracked"] == module.num_batches_tracked == 3
    undone = (await client.post(f"{url}/rollback", json={"version": back["version"] - 1})).json()
    assert undone["weight"] == [7, 7], "a rollback can be undone, too"


async def test_rollback_of_a_population_layer(every_batch):
    client = every_batch
    url = await made(client, statistics="population")
    version = await train(client, url, BATCHES[0])
    await train(client, url, [[1e9, 1e9]])
    (await client.post(f"{url}/rollback", json={"version": version})).raise_for_status()
    await train(client, url, BATCHES[1])
    samples = np.concatenate([BATCHES[0], BATCHES[1]])
    layer = await get(client, url)
    np.testing.assert_allclose(layer["running_mean"], samples.mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer["running_var"], samples.var(0, ddof=1), rtol=1e-6)
    assert layer["samples_tracked"] == len(samples)


async def test_rollback_with_a_key_and_with_if_match(every_batch):
    client, url = every_batch, await made(every_batch)
    version = await train(client, url, BATCHES[0])
    current = await train(client, url, BATCHES[1])
    body, key = {"version": version}, {"Idempotency-Key": "back"}
    stale = {"If-Match": f'"{version}"'}
    assert problem(await client.post(f"{url}/rollback", json=body, headers=stale)) == (412, "version-mismatch")
    first = await client.post(f"{url}/rollback", json=body, headers=key | {"If-Match": f'"{current}"'})
    await train(client, url, BATCHES[2])
    again = await client.post(f"{url}/rollback", json=body, headers=key)
    assert again.headers["idempotent-replay"] == "true"
    assert [again.json()[name] for name in ("version", "num_batches_tracked")] == [first.json()["version"], 1]
    assert (await get(client, url))["num_batches_tracked"] == 2, "the batch after it was not undone"
    other = await client.post(f"{url}/rollback", json={"version": current}, headers=key)
    assert problem(other) == (422, "idempotency-key-reused")


async def test_a_repeated_rollback_to_a_state_that_is_gone(serve):
    async with serve(history_seconds=0, history_length=1) as service, service.client() as client:
        url = await made(client)
        version = await train(client, url, BATCHES[0])
        await train(client, url, BATCHES[1])
        call = {"json": {"version": version}, "headers": {"Idempotency-Key": "k"}}
        (await client.post(f"{url}/rollback", **call)).raise_for_status()
        await train(client, url, BATCHES[2])
        again = await client.post(f"{url}/rollback", **call)
        assert (again.status_code, again.headers["idempotent-replay"]) == (200, "true")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"version": None},
        {"version": 1, "tag": None},
        {"version": 1, "tag": "a"},
        {"version": "1"},
        {"version": -1},
        {"tag": "7"},
        {"tag": ""},
        {"to": 1},
    ],
)
async def test_wrong_rollbacks(client, layer, body):
    before = await get(client, layer)
    assert problem(await client.post(f"{layer}/rollback", json=body)) == (422, "invalid-request")
    assert await get(client, layer) == before


async def test_a_pin_outlives_what_comes_after_it(serve):
    async with serve(history_seconds=0, history_length=1) as service, service.client() as client:
        url = await made(client)
        await train(client, url, BATCHES[0])
        state = await get(client, url)
        answer = await client.put(f"{url}/pins/ckpt-100k", json={})
        pin = answer.json()
        assert (answer.status_code, answer.headers["location"]) == (201, f"{url}/pins/ckpt-100k")
        assert pin == {"tag": "ckpt-100k", "version": state["version"], "digest": state["digest"], "at": pin["at"]}
        output = (await client.post(f"{url}/eval?at=ckpt-100k", json={"input": BATCHES[1]})).json()
        await client.post(f"{url}/reset", json={"what": "all"})
        for batch in (*BATCHES, *BATCHES):
            await train(client, url, batch)
        await client.post(f"{url}/rollback", json={"version": (await history(client, url))[1]["version"]})
        assert await get(client, url, at="ckpt-100k") == state
        at = {"at": "ckpt-100k", "expect": pin["digest"]}
        again = await client.post(f"{url}/eval", params=at, json={"input": BATCHES[1]})
        assert (again.json(), again.headers["batchnorm-digest"]) == (output, pin["digest"])
        assert (await get(client, f"{url}/pins")) == {"pins": [pin]}
        assert await get(client, f"{url}/pins/ckpt-100k") == pin
        back = await client.post(f"{url}/rollback", json={"tag": "ckpt-100k"})
        assert back.json()["running_var"] == state["running_var"]


async def test_the_same_tag(client, layer):
    first = await client.put(f"{layer}/pins/v1.0", json={}, headers={"Idempotency-Key": "pin"})
    assert (await client.put(f"{layer}/pins/v1.0", json={})).status_code == 200
    await train(client, layer, BATCHES[0])
    assert problem(await client.put(f"{layer}/pins/v1.0", json={})) == (409, "pin-exists")
    repeat = await client.put(f"{layer}/pins/v1.0", json={}, headers={"Idempotency-Key": "pin"})
    assert (repeat.status_code, repeat.json()) == (200, first.json())
    body = {"version": first.json()["version"]}
    assert (await client.put(f"{layer}/pins/v1.0", json=body)).status_code == 200
    reused = await client.put(f"{layer}/pins/v1.0", json=body, headers={"Idempotency-Key": "pin"})
    assert problem(reused) == (422, "idempotency-key-reused")
    assert (await client.put(f"{layer}/pins/second", json=body)).status_code == 201, "a state may have several tags"
    assert [pin["tag"] for pin in (await get(client, f"{layer}/pins"))["pins"]] == ["second", "v1.0"]


async def test_a_deleted_pin(client, layer):
    await client.put(f"{layer}/pins/a")
    await train(client, layer, BATCHES[0])
    assert (await client.post(f"{layer}/eval?at=a", json={"input": BATCHES[0]})).status_code == 200
    assert (await client.delete(f"{layer}/pins/a")).status_code == 204
    assert problem(await client.delete(f"{layer}/pins/a")) == (404, "version-not-found")
    assert problem(await client.get(f"{layer}/pins/a")) == (404, "version-not-found")
    eval_ = await client.post(f"{layer}/eval?at=a", json={"input": BATCHES[0]})
    assert problem(eval_) == (404, "version-not-found")
    assert (await client.put(f"{layer}/pins/a")).status_code == 201, "the tag is free again"


async def test_a_layer_that_has_pins_is_not_deleted_by_mistake(client, layer):
    await client.put(f"{layer}/pins/a")
    assert problem(await client.delete(layer)) == (409, "layer-pinned")
    assert problem(await client.delete(layer, params={"pins": "keep"})) == (409, "layer-pinned")
    assert (await client.get(layer)).status_code == 200
    assert (await client.delete(layer, params={"pins": "delete"})).status_code == 204
    await client.put(layer, json={"num_features": 2})
    assert await get(client, f"{layer}/pins") == {"pins": []}
    assert len(await history(client, layer)) == 1
    assert problem(await client.get(layer, params={"at": "a"})) == (404, "version-not-found")


async def test_too_many_pins(serve):
    async with serve(max_pins=2) as service, service.client() as client:
        url = await made(client)
        for tag in ("a", "b"):
            (await client.put(f"{url}/pins/{tag}")).raise_for_status()
        assert problem(await client.put(f"{url}/pins/c")) == (409, "too-many-pins")
        assert (await client.put(f"{url}/pins/b")).status_code == 200


@pytest.mark.parametrize("tag", ["7", "0123", "-a", ".a", "a b", "a" * 201, "ä", "a%00"])
async def test_invalid_tags(client, layer, tag):
    for method in ("PUT", "GET", "DELETE"):
        assert problem(await client.request(method, f"{layer}/pins/{tag}")) == (422, "invalid-request"), method
    assert problem(await client.get(layer, params={"at": tag})) == (
        (404, "version-not-found") if tag.isdecimal() else (422, "invalid-request")
    )


@pytest.mark.parametrize("tag", ["a", "7a", "0.1", "00-", "a" * 200, "Best_Model-1.0"])
async def test_valid_tags(client, layer, tag):
    assert (await client.put(f"{layer}/pins/{tag}", json={})).status_code == 201
    assert (await client.get(layer, params={"at": tag})).status_code == 200


async def test_what_is_wrong_with_a_tag_or_a_digest_is_said_in_words(client, layer):
    """Seen: a regular expression in `detail`."""
    tag = await client.put(f"{layer}/pins/7")
    in_body = await client.post(f"{layer}/rollback", json={"tag": "7"})
    for answer in (tag, in_body):
        assert "'7' is no tag: 1 to 200 letters, digits" in answer.json()["detail"]
        assert (answer.json()["field"], answer.json()["got"]) == ("tag", "7")
        assert answer.json()["expected"].startswith("^")
    assert "'a b' is no version or tag: " in (await client.get(layer, params={"at": "a b"})).json()["detail"]
    wrong = await client.post(f"{layer}/eval", params={"expect": "sha"}, json={"input": BATCHES[0]})
    assert wrong.json()["detail"] == "expect: 'sha' is no digest: sha-256: and 64 hexadecimal digits in lower case"


@pytest.mark.parametrize("call", ["eval", "inverse"])
async def test_another_digest_is_never_served_silently(client, layer, call):
    digest = (await get(client, layer))["digest"]
    url = f"{layer}/{call}"
    batch = {"input": BATCHES[0]}
    assert (await client.post(url, params={"expect": digest}, json=batch)).status_code == 200
    await client.put(f"{layer}/pins/a")
    await train(client, layer, BATCHES[1])
    answer = await client.post(url, params={"expect": digest}, json=batch)
    assert problem(answer) == (412, "digest-mismatch")
    assert answer.json()["got"] == digest
    assert answer.json()["expected"] == (await get(client, layer))["digest"]
    assert (await client.post(url, params={"expect": digest, "at": "a"}, json=batch)).status_code == 200
    for wrong in ("", "sha-256:", digest.upper(), digest[8:], f"{digest}0"):
        assert problem(await client.post(url, params={"expect": wrong}, json=batch)) == (422, "invalid-request")


@pytest.mark.parametrize("path", ["history", "pins", "pins/a"])
async def test_a_layer_that_is_missing(client, path):
    assert problem(await client.get(f"/v1/layers/none/{path}")) == (404, "layer-not-found")
    for answer in (
        await client.put("/v1/layers/none/pins/a"),
        await client.delete("/v1/layers/none/pins/a"),
        await client.post("/v1/layers/none/rollback", json={"version": 1}),
        await client.post("/v1/layers/none/eval?at=3", json={"input": BATCHES[0]}),
    ):
        assert problem(answer) == (404, "layer-not-found")


async def test_frequent_weights_do_not_fill_the_history(client, layer):
    """An optimizer sends weight and bias at every step."""
    before = len(await history(client, layer))
    for step in range(30):
        (await client.patch(layer, json={"weight": [step, step], "bias": [0, 0]})).raise_for_status()
    assert len(await history(client, layer)) == before


async def test_a_kept_state_as_safetensors_says_its_digest(client, layer):
    await client.put(f"{layer}/pins/a")
    await train(client, layer, BATCHES[1])
    answer = await client.get(f"{layer}/state", params={"at": "a"}, headers={"Accept": SAFETENSORS})
    assert answer.headers["batchnorm-digest"] == (await get(client, f"{layer}/pins/a"))["digest"]
