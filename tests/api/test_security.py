"""Bearer tokens."""

import pytest

pytestmark = pytest.mark.anyio


@pytest.fixture
async def guarded(serve):
    async with serve(token="full", read_token="read") as service:
        async with service.client(authorization="Bearer full") as client:
            (await client.put("/v1/layers/bn", json={"num_features": 2})).raise_for_status()
        yield service


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic full", "full", "Bearer full, Bearer full"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/layers"), ("POST", "/v1/layers/bn/train"), ("GET", "/v1/nowhere"), ("PUT", "/v1/layers/.bad")],
)
async def test_without_a_token(guarded, method, path, authorization):
    async with guarded.client() as client:
        headers = {} if authorization is None else {"Authorization": authorization}
        answer = await client.request(method, path, headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (401, "/problems/unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/problems", "/problems/forbidden", "/docs", "/openapi.json"])
async def test_some_pages_are_open(guarded, path):
    async with guarded.client() as client:
        assert (await client.get(path)).status_code == 200


async def test_the_read_token_reads(guarded):
    async with guarded.client(authorization="bearer read") as client:
        for method, call in (("GET", ""), ("HEAD", ""), ("GET", "/state"), ("POST", "/eval")):
            arguments = {"json": {"input": [[1, 2]]}} if method == "POST" else {}
            answer = await client.request(method, f"/v1/layers/bn{call}", **arguments)
            assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("PUT", ""),
        ("PATCH", ""),
        ("DELETE", ""),
        ("POST", "/train"),
        ("POST", "/reset"),
        ("PUT", "/state"),
        ("PUT", "/eval"),
        ("POST", "/backward"),
        ("POST", "/moments"),
        ("POST", "/eval/"),
    ],
)
async def test_the_read_token_changes_nothing(guarded, method, call):
    async with guarded.client(authorization="Bearer read") as client:
        answer = await client.request(method, f"/v1/layers/bn{call}", json={})
        assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forbidden")
        assert (await client.get("/v1/layers/bn")).json()["version"] == 1


async def test_tokens_are_in_no_repr(guarded):
    assert "full" not in repr(guarded.shell.app.state.settings)
    assert "full" not in repr(guarded.shell._guard)
