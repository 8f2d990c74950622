"""Bearer tokens."""

import json
import re
from urllib.parse import unquote

import pytest

from batchnorm_service.rest.application import ROUTERS
from batchnorm_service.rest.security import Guard

from .conftest import by_asgi

pytestmark = pytest.mark.anyio


@pytest.fixture
async def guarded(serve):
    async with serve(token="full", read_token="read") as service:
        async with service.client(authorization="Bearer full") as client:
            (await client.put("/v1/layers/bn", json={"num_features": 2})).raise_for_status()
        yield service


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", "Basic full", "full", "Bearer full, Bearer full"]
)
async def test_without_a_token(guarded, authorization):
    calls = ("GET", "/v1/layers"), ("POST", "/v1/layers/bn/train"), ("GET", "/v1/nowhere"), ("PUT", "/v1/layers/.bad")
    async with guarded.client() as client:
        for method, path in calls:
            headers = {} if authorization is None else {"Authorization": authorization}
            answer = await client.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["type"]) == (401, "/problems/unauthenticated"), path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]


@by_asgi
@pytest.mark.parametrize(("method", "path"), [("GET", b"/v1/layers"), ("POST", b"/v1/layers/bn/train")])
async def test_an_empty_token(guarded, method, path):
    """A client that speaks HTTP leaves out the space at the end."""
    status, document = await requested(guarded, method, path, (b"authorization", b"Bearer "))
    assert (status, document["type"]) == (401, "/problems/unauthenticated")


OPEN = {
    "/": 200,
    "/docs": 200,
    "/docs/start.js": 200,
    "/docs/swagger-ui-bundle.js": 200,
    "/docs/swagger-ui.css": 200,
    "/healthz": 200,
    "/openapi.json": 200,
    "/problems": 200,
    "/problems/{problem}": 404,  # there is none of the name that is asked for below
    "/readyz": 200,
}
"""Every route that needs no token, with what a GET without one is answered."""

GUARDED = {
    "/v1/layers",
    "/v1/layers/{name}",
    "/v1/layers/{name}/backward",
    "/v1/layers/{name}/eval",
    "/v1/layers/{name}/history",
    "/v1/layers/{name}/inverse",
    "/v1/layers/{name}/moments",
    "/v1/layers/{name}/pins",
    "/v1/layers/{name}/pins/{tag}",
    "/v1/layers/{name}/reset",
    "/v1/layers/{name}/rollback",
    "/v1/layers/{name}/state",
    "/v1/layers/{name}/train",
    "/v1/moments",
}


async def test_every_route_has_a_rule(guarded):
    """A route that is in neither list above fails here: say which it is, also in `security.PUBLIC_PATHS` if open."""
    found = {(method, route.path) for router in ROUTERS for route in router.routes for method in route.methods}
    assert {path for _, path in found} == GUARDED | OPEN.keys()
    async with guarded.client() as client:
        for method, path in found:
            answer = await client.request(method, re.sub(r"\{\w+\}", "bn", path))
            assert answer.status_code == OPEN.get(path, 401), (method, path)


@by_asgi
async def test_the_document_says_which_routes_need_a_token(guarded):
    document = guarded.gateway.app.openapi()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == ("401" in operation["responses"]) == (path in GUARDED), path


async def test_a_route_that_is_added_needs_a_token(guarded):
    @guarded.gateway.app.get("/added/{name}")
    async def added(name: str):
        return name

    async with guarded.client() as client:
        for authorization, status in ((None, 401), ("Bearer wrong", 401), ("Bearer read", 200), ("Bearer full", 200)):
            headers = {} if authorization is None else {"Authorization": authorization}
            assert (await client.get("/added/x", headers=headers)).status_code == status


@by_asgi
@pytest.mark.parametrize(
    "path",
    [
        "//",
        "//healthz",
        "//v1/layers",
        "/./healthz",
        "/v1/../healthz",
        "/healthz/../v1/layers",
        "/docs/../v1/layers",
        "/docs/%2e%2e/v1/layers",
        "/docs%2Fstart.js",
        "/problems/../v1/layers",
        "/problems/x/y",
        "/problems/",
        "/problemsX",
        "/%2Fhealthz",
        "/healthz/",
        "/healthz%2F",
        "/healthz%00",
        "/healthz;x",
        "/HEALTHZ",
        "/Docs",
        "/docs/",
        "/docs/redoc.standalone.js",
        "/v1",
        "/%76%31/layers",
        "/V1/layers",
        "/v2",
        "/metrics",
        "/ui",
        "/nowhere",
        "*",
        "healthz",
        "",
    ],
)
async def test_whatever_is_not_listed_needs_a_token(guarded, path):
    """Only calls below /v1 were guarded; now the path that is checked is the one that is routed, in one spelling."""
    for method in ("GET", "POST", "OPTIONS", "QUERY"):
        status, document = await requested(guarded, method, path.encode())
        assert (status, document["type"]) == (401, "/problems/unauthenticated")


async def requested(service, method, raw_path, *headers):
    """What a request with that very path is answered; an HTTP library would tidy it up."""
    scope = {"type": "http", "method": method, "path": unquote(raw_path.decode()), "raw_path": raw_path}
    sent = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    await service.gateway(scope | {"query_string": b"", "headers": list(headers)}, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


@pytest.mark.parametrize("path", ["/%68ealthz", "/problems/%66orbidden"])
async def test_an_open_path_may_be_escaped(guarded, path):
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


@by_asgi
async def test_tokens_are_in_no_repr(guarded):
    assert "full" not in repr(guarded.gateway.app.state.settings)
    assert "full" not in repr(Guard("full", "read"))
