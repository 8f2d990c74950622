"""Tokens that are bound to a prefix: other layers do not exist for them, in any call."""

import contextlib
from itertools import chain

import numpy as np
import pytest
from safetensors.numpy import save

from batchnorm_service.tokens import Scope, add_token

from .test_security import LEVELS, SCOPES, name_of

pytestmark = pytest.mark.anyio

OUTSIDE = ["team2.bn", "team10.bn", "team1", "team1x", "Team1.bn", "xteam1.bn", "first", "zzz"]


@pytest.fixture
async def clients(serve, tmp_path):
    """A client for each scope within team1., and `all`: one that is not bound. Both kinds of layers exist."""
    path = tmp_path / "tokens"
    tokens = {scope: add_token(path, Scope.parse(scope), "team1.")[0] for scope in LEVELS}
    tokens["all"] = add_token(path, Scope.ADMIN, "")[0]
    async with contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(serve(tokens_file=path))
        made = {
            name: await stack.enter_async_context(service.client(authorization=f"Bearer {token}"))
            for name, token in tokens.items()
        }
        for name in ("team1.a", "team1.bn", "team1.c", *OUTSIDE):
            (await made["all"].put(f"/v1/layers/{name}", json={"num_features": 2})).raise_for_status()
        yield made


def without(name, answer):
    """Status and document, with NAME instead of the layer's name."""
    document = {key: str(value).replace(name, "NAME") for key, value in answer.json().items()}
    return answer.status_code, document


@pytest.mark.parametrize("call", [call for call in SCOPES if "{name}" in call[1]], ids=" ".join)
async def test_a_layer_outside_answers_as_one_that_does_not_exist(clients, call):
    method, path = call
    before = {name: (await clients["all"].get(f"/v1/layers/{name}")).json() for name in OUTSIDE}
    arguments = {"json": {"num_features": 2} if (method, path) == ("PUT", "/v1/layers/{name}") else {}}
    for scope in LEVELS:
        if LEVELS.index(scope) < LEVELS.index(SCOPES[call]):
            continue  # 403: test_security.py
        for name in (*OUTSIDE, "team2.new"):
            answer = await clients[scope].request(method, path.format(name=name, tag="t1", version="t1"), **arguments)
            if (method, path) == ("PUT", "/v1/layers/{name}"):
                assert (answer.status_code, name_of(answer)) == (403, "forbidden")
                assert (answer.json()["expected"], answer.json()["got"]) == ("team1.", name)
            else:
                missing = await clients["all"].get("/v1/layers/missing")
                status, document = without(name, answer)
                expected_status, expected = without("missing", missing)
                assert expected.pop("instance") == "/v1/layers/NAME"
                if path.startswith("/v2"):
                    expected = {"error": expected["detail"]}
                else:
                    assert document.pop("instance") == path.format(name="NAME", tag="t1")
                assert (status, document) == (expected_status, expected)
                assert status == 404
                assert name_of(answer) == "layer-not-found"
    assert before == {name: (await clients["all"].get(f"/v1/layers/{name}")).json() for name in OUTSIDE}
    assert (await clients["all"].get("/v1/layers/team2.new")).status_code == 404


async def test_within_its_prefix_a_token_does_what_its_scope_allows(clients):
    batch = {"input": [[1, 2], [3, 5]]}
    assert (await clients["train"].put("/v1/layers/team1.new", json={"num_features": 2})).status_code == 201
    assert (await clients["train"].post("/v1/layers/team1.new/train", json=batch)).status_code == 200
    assert (await clients["read"].post("/v1/layers/team1.new/eval", json=batch)).status_code == 200
    assert (await clients["read"].head("/v1/layers/team1.new")).status_code == 200
    assert (await clients["read"].post("/v1/layers/team1.new/train", json=batch)).status_code == 403
    assert (await clients["train"].delete("/v1/layers/team1.new")).status_code == 403
    assert (await clients["admin"].delete("/v1/layers/team1.new")).status_code == 204
    assert (await clients["read"].get("/v1/layers/team1.new")).status_code == 404


async def test_a_bad_name_is_what_it_is_for_everybody(clients):
    """The contract: `invalid-request` on every method."""
    for name in (".bad", "team1.%2F..%2Fteam2.bn", "team1.%00", "team2.%C3%A9"):
        for scope in ("read", "all"):
            answer = await clients[scope].get(f"/v1/layers/{name}")
            assert (answer.status_code, name_of(answer)) == (422, "invalid-request")


@pytest.mark.parametrize(
    "path",
    ["/v1/layers/team1.a/../team2.bn", "/v1/layers/team1.a/..%2Fteam2.bn", "/v1/layers/team1.a/%2e%2e/team2.bn/eval"],
)
async def test_no_path_leads_outside(clients, path):
    for method in ("GET", "POST", "PUT", "DELETE"):
        answer = await clients["admin"].request(method, path.replace("..", "%2e%2e"))  # httpx would resolve `..`
        assert answer.status_code == 404
    assert (await clients["all"].get("/v1/layers/team2.bn")).json()["version"] == 1


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("", ["team1.a", "team1.bn", "team1.c"]),
        ("team", ["team1.a", "team1.bn", "team1.c"]),
        ("team1.", ["team1.a", "team1.bn", "team1.c"]),
        ("team1.b", ["team1.bn"]),
        ("team1.x", []),
        ("team10", []),
        ("team2.", []),
        ("first", []),
    ],
)
async def test_lists_know_visible_layers_only(clients, prefix, names):
    for limit in (1, 2, 3, 1000):
        pages, after = [], ""
        while after is not None:
            answer = await clients["read"].get(f"/v1/layers?prefix={prefix}&after={after}&limit={limit}")
            page = answer.json()
            pages.append([layer["name"] for layer in page["layers"]])
            after = page["next"]
        assert list(chain(*pages)) == names
        assert all(len(page) == limit for page in pages[:-1])
        assert len(pages) == max(1, -(-len(names) // limit))  # no page is empty or short because of hidden layers


@pytest.mark.parametrize(
    ("after", "first"), [("a", "team1.a"), ("team1.a", "team1.bn"), ("team10.bn", None), ("z", None)]
)
async def test_a_list_after_any_name(clients, after, first):
    page = (await clients["read"].get(f"/v1/layers?after={after}&limit=1")).json()
    assert [layer["name"] for layer in page["layers"]] == ([first] if first else [])


@pytest.mark.parametrize("media", ["application/json", "application/vnd.safetensors"])
async def test_many_layers_one_by_one(clients, media):
    names = ["team1.a", "team2.bn", "team1.missing", "team2.missing", ".bad", "team1.c"]
    if media == "application/json":
        moments = {"count": 4, "mean": [1.0, 2.0], "var": [1.0, 1.0]}
        sent = {"json": {"layers": dict.fromkeys(names, moments)}}
    else:
        tensors = {"count": np.array(4), "mean": np.array([1.0, 2.0]), "var": np.array([1.0, 1.0])}
        body = save({f"{name}/{key}": tensor for name in names for key, tensor in tensors.items()})
        sent = {"content": body, "headers": {"Content-Type": media}}
    results = (await clients["train"].post("/v1/moments", **sent)).json()["layers"]
    assert set(results) == set(names)
    assert results["team1.a"]["num_batches_tracked"] == results["team1.c"]["num_batches_tracked"] == 1
    hidden, missing = (
        {key: str(results[name][key]).replace(name, "NAME") for key in results[name]} for name in names[1:3]
    )
    assert hidden == missing
    assert {results[name]["type"] for name in names[1:4]} == {"/problems/layer-not-found"}
    assert results[".bad"]["type"] == "/problems/invalid-request"
    assert (await clients["all"].get("/v1/layers/team2.bn")).json()["num_batches_tracked"] == 0


async def test_an_unknown_path_does_not_exist(clients):
    for path in ("/v1/nowhere", "/nowhere", "/v1/layers/team1.a/nowhere"):
        assert (await clients["read"].get(path)).status_code == 404
        assert (await clients["admin"].post(path)).status_code == 404


async def test_a_route_that_an_application_adds_is_hidden_from_bound_tokens(serve, tmp_path):
    """It may show any layer."""
    path = tmp_path / "tokens"
    bound, _ = add_token(path, Scope.ADMIN, "team1.")
    free, _ = add_token(path, Scope.READ, "")
    async with serve(tokens_file=path) as service:

        @service.gateway.app.get("/added")
        async def added():
            return "every layer"

        for token, status in ((bound, 404), (free, 200)):
            async with service.client(authorization=f"Bearer {token}") as client:
                assert (await client.get("/added")).status_code == status
