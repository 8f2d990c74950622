"""Bearer tokens: which calls each scope allows, on every route."""

import contextlib
import json
import re
from urllib.parse import unquote

import pytest

from batchnorm_service.app import INTERFACES
from batchnorm_service.rest.application import all_routers
from batchnorm_service.rest.routes import READ, document_router
from batchnorm_service.rest.security import Guard, Rules
from batchnorm_service.tokens import Scope, add_token, revoke_token

from .conftest import by_asgi

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def wrong_tokens_are_not_delayed(monkeypatch):
    monkeypatch.setattr("batchnorm_service.rest.security.failures.MAX_DELAY", 0.0)


@pytest.fixture
async def guarded(serve):
    async with serve(token="full", read_token="read") as service:
        async with service.client(authorization="Bearer full") as client:
            (await client.put("/v1/layers/bn", json={"num_features": 2})).raise_for_status()
        yield service


@pytest.mark.parametrize(
    "authorization",
    [
        *(None, "", "Bearer", "Bearer wrong", "Basic full", "full", "Bearer full, Bearer full", "Bearer full full"),
        *("Bearer Full", "Bearer ful", "Bearer fullx", "Bearer\tfull", "Bearerfull", "Bearer:full", "Token full"),
        *("Bearer full;", 'Bearer "full"', "Bearer " + "x" * 10_000, "Bearer full\u00e9".encode(), b"Bearer \xff"),
    ],
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
    "/metrics": 200,
    "/openapi.json": 200,
    "/problems": 200,
    "/problems/{problem}": 404,  # there is none of the name that is asked for below
    "/readyz": 200,
    "/ui/login": 200,
    "/ui/static/{file}": 404,
    "/v2": 200,
    "/v2/health/live": 200,
    "/v2/health/ready": 200,
}
"""Every route that needs no token, with what a GET without one is answered."""

PUBLIC_CALLS = {("GET", path): status for path, status in OPEN.items()} | {("POST", "/ui/login"): 415}
"""With the login, which wants a form."""

SCOPES = {
    ("GET", "/v1/layers"): "read",
    ("GET", "/v1/layers/{name}"): "read",
    ("PUT", "/v1/layers/{name}"): "train",
    ("PATCH", "/v1/layers/{name}"): "train",
    ("DELETE", "/v1/layers/{name}"): "admin",
    ("POST", "/v1/layers/{name}/backward"): "read",
    ("GET", "/v1/layers/{name}/drift"): "read",
    ("POST", "/v1/layers/{name}/eval"): "read",
    ("GET", "/v1/layers/{name}/history"): "read",
    ("POST", "/v1/layers/{name}/inverse"): "read",
    ("POST", "/v1/layers/{name}/moments"): "train",
    ("GET", "/v1/layers/{name}/pins"): "read",
    ("GET", "/v1/layers/{name}/pins/{tag}"): "read",
    ("PUT", "/v1/layers/{name}/pins/{tag}"): "train",
    ("DELETE", "/v1/layers/{name}/pins/{tag}"): "admin",
    ("POST", "/v1/layers/{name}/reset"): "admin",
    ("POST", "/v1/layers/{name}/rollback"): "admin",
    ("GET", "/v1/layers/{name}/state"): "read",
    ("PUT", "/v1/layers/{name}/state"): "train",
    ("POST", "/v1/layers/{name}/train"): "train",
    ("POST", "/v1/moments"): "train",
    ("GET", "/v1/state"): "read",
    ("PUT", "/v1/state"): "train",
    ("GET", "/ui"): "read",
    ("GET", "/ui/"): "read",
    ("GET", "/ui/layers/{name}"): "read",
    ("GET", "/ui/layers/{name}/drift"): "read",
    ("GET", "/ui/layers/{name}/state"): "read",
    ("GET", "/ui/layers/{name}/values"): "read",
    ("GET", "/ui/operations"): "read",
    ("GET", "/ui/operations/figures"): "read",
    ("POST", "/ui/example"): "train",
    ("POST", "/ui/layers/{name}/histogram"): "read",
    ("POST", "/ui/layers/{name}/pin"): "train",
    ("POST", "/ui/layers/{name}/reset"): "admin",
    ("POST", "/ui/layers/{name}/rollback"): "admin",
    ("POST", "/ui/layers/{name}/unpin"): "admin",
    ("POST", "/ui/logout"): "read",
    ("GET", "/v2/models/{name}"): "read",
    ("POST", "/v2/models/{name}/infer"): "read",
    ("GET", "/v2/models/{name}/ready"): "read",
    ("GET", "/v2/models/{name}/stats"): "read",
    ("GET", "/v2/models/{name}/versions/{version}"): "read",
    ("POST", "/v2/models/{name}/versions/{version}/infer"): "read",
    ("GET", "/v2/models/{name}/versions/{version}/ready"): "read",
    ("POST", "/v2/repository/index"): "read",
}
"""Every route that needs a token, with the scope that the contract gives it."""

ROUTERS = all_routers(INTERFACES)
LEVELS = ["read", "train", "admin"]


def found_routes():
    return {(method, route.path) for router in ROUTERS for route in router.routes for method in route.methods}


async def test_every_route_has_a_rule(guarded):
    """A route that is in neither table above fails here: say which it is."""
    assert found_routes() == SCOPES.keys() | PUBLIC_CALLS.keys()
    async with guarded.client() as client:
        for method, path in found_routes():
            answer = await client.request(method, re.sub(r"\{\w+\}", "bn", path))
            assert answer.status_code == PUBLIC_CALLS.get((method, path), 401), (method, path)


async def test_every_token_on_every_route(serve, tmp_path):
    """Missing, wrong, revoked, too small, large enough; what is refused has changed nothing."""
    path = tmp_path / "tokens"
    tokens = {scope: add_token(path, Scope.parse(scope), "")[0] for scope in LEVELS}
    revoked, stored = add_token(path, Scope.ADMIN, "")
    revoke_token(path, stored.id)
    async with contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(serve(tokens_file=path, token="full", read_token="look"))
        admin, look, *clients = [
            await stack.enter_async_context(service.client(authorization=f"Bearer {token}"))
            for token in ("full", "look", *tokens.values())
        ]
        for (method, path), needed in SCOPES.items():
            await admin.put("/v1/layers/bn", json={"num_features": 2})
            before = (await admin.get("/v1/layers/bn")).json()
            arguments = method, path.replace("{name}", "bn")
            for wrong in (None, revoked, "wrong", tokens["admin"][:-1], tokens["admin"].lower(), "full,full"):
                async with service.client(**({} if wrong is None else {"authorization": f"Bearer {wrong}"})) as client:
                    answer = await client.request(*arguments, json={})
                    assert (answer.status_code, name_of(answer)) == (401, "unauthenticated"), (arguments, wrong)
            for client, scope in zip((*clients, look), (*LEVELS, "read"), strict=True):
                if LEVELS.index(scope) < LEVELS.index(needed):
                    answer = await client.request(*arguments, json={})
                    assert (answer.status_code, name_of(answer)) == (403, "forbidden"), (arguments, scope)
                    if not path.startswith("/v2"):
                        document = answer.json()
                        assert (document["expected"], document["got"]) == (needed, scope)
                        assert needed in document["detail"]
                        assert scope in document["detail"]
            assert (await admin.get("/v1/layers/bn")).json() == before
            for client, scope in zip(clients, LEVELS, strict=True):
                if LEVELS.index(scope) >= LEVELS.index(needed):
                    answer = await client.request(*arguments, json={})
                    assert answer.status_code not in {401, 403, 404, 405, 500}, (arguments, scope)
                    await admin.put("/v1/layers/bn", json={"num_features": 2})


def name_of(answer):
    """The problem's name; below /v2 an error has none, but these have a status of their own."""
    document = answer.json()
    if answer.request.url.path.startswith("/v2"):
        assert (list(document), answer.headers["content-type"]) == (["error"], "application/json")
        return {401: "unauthenticated", 403: "forbidden", 404: "layer-not-found"}[answer.status_code]
    return document["type"].removeprefix("/problems/")


async def test_a_train_token_patches_weight_and_bias_only(serve, tmp_path):
    token, _ = add_token(tmp_path / "tokens", Scope.TRAIN, "")
    async with serve(tokens_file=tmp_path / "tokens") as service, service.client(authorization=f"Bearer {token}") as it:
        await it.put("/v1/layers/bn", json={"num_features": 2})
        for parameters in ({"weight": [2, 2]}, {"bias": [1, 1]}, {"weight": [1, 1], "bias": [0, 0]}):
            assert (await it.patch("/v1/layers/bn", json=parameters)).status_code == 200
        before = (await it.get("/v1/layers/bn")).json()
        for other in (
            {"eps": 1e-3},
            {"momentum": None},
            {"clip": 3.0},
            {"track_running_stats": False},
            {"non_finite": "allow"},
            {"weight": [2, 2], "eps": before["config"]["eps"]},
        ):
            answer = await it.patch("/v1/layers/bn", json=other)
            assert (answer.status_code, answer.json()["expected"]) == (403, "admin"), other
        assert (await it.get("/v1/layers/bn")).json() == before


@by_asgi
async def test_a_route_without_a_rule_is_refused_at_start(guarded):
    router = document_router("layers")

    @router.get("/v1/forgotten")
    async def forgotten() -> str:
        return ""

    with pytest.raises(RuntimeError, match="/v1/forgotten"):
        Rules([*ROUTERS, router])


@by_asgi
async def test_a_public_route_with_a_scope_is_refused_at_start(guarded):
    router = document_router("layers")

    @router.get("/healthz", dependencies=[READ])
    async def contradictory() -> str:
        return ""

    with pytest.raises(RuntimeError, match="/healthz"):
        Rules([router])


@by_asgi
async def test_the_document_says_which_routes_need_a_token(guarded):
    document = guarded.gateway.app.openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            refusals = {"401", "403"} & operation["responses"].keys()
            if path in OPEN:
                assert "security" not in operation
                assert not refusals
            else:
                assert operation["security"] == [{}, {"token": [SCOPES[method.upper(), path]]}]
                assert refusals == {"401", "403"}


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
        "/v2/models",
        "/v2/health/x/y",
        "/v2/health",
        "/v2/",
        "/metrics/",
        "/metrics2",
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
        assert status == 401
        if path.startswith("/v2/"):
            assert list(document) == ["error"]
        else:
            assert document["type"] == "/problems/unauthenticated"


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


@pytest.mark.parametrize("others", [["Bearer full"], ["Bearer wrong"], ["Basic full"], [""]])
@pytest.mark.parametrize("first", [True, False])
async def test_two_headers_are_refused(guarded, others, first):
    """A proxy may check one of them, and the service the other."""
    values = ["Bearer full", *others] if first else [*others, "Bearer full"]
    headers = [("Authorization", value) for value in values]
    async with guarded.client() as client:
        for method, path in (("GET", "/v1/layers"), ("POST", "/v1/layers/bn/eval")):
            answer = await client.request(method, path, headers=headers)
            assert (answer.status_code, name_of(answer)) == (401, "unauthenticated")


@pytest.mark.parametrize("authorization", ["Bearer full", "bearer full", "BEARER full", "Bearer   full"])
async def test_the_scheme_is_of_any_case(guarded, authorization):
    """RFC 9110, 11.1; and one or more spaces (RFC 6750, 2.1)."""
    async with guarded.client(authorization=authorization) as client:
        assert (await client.get("/v1/layers")).status_code == 200
        assert (await client.post("/v1/layers/bn/eval", json={"input": [[1, 2]]})).status_code == 200


@pytest.mark.parametrize("path", ["/%68ealthz", "/problems/%66orbidden"])
async def test_an_open_path_may_be_escaped(guarded, path):
    async with guarded.client() as client:
        assert (await client.get(path)).status_code == 200


async def test_the_read_token_reads(guarded):
    async with guarded.client(authorization="bearer read") as client:
        for method, call in (("GET", ""), ("HEAD", ""), ("GET", "/state"), ("POST", "/eval"), ("POST", "/inverse")):
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
        ("POST", "/moments"),
        ("POST", "/eval/"),
    ],
)
async def test_the_read_token_changes_nothing(guarded, method, call):
    async with guarded.client(authorization="Bearer read") as client:
        answer = await client.request(method, f"/v1/layers/bn{call}", json={})
        assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forbidden")
        assert (await client.get("/v1/layers/bn")).json()["version"] == 1


async def test_a_group_needs_more_than_the_read_token(guarded):
    """Its members get what the others have sent, and the store keeps it."""
    body = {"input": [[1, 2], [3, 5]], "grad_output": [[1, 0], [0, 1]]}
    url, group = "/v1/layers/bn/backward", {"group": "g", "size": 1}
    async with guarded.client(authorization="Bearer read") as client:
        assert (await client.post(url, json=body)).status_code == 200
        answer = await client.post(url, params=group, json=body)
        assert (answer.status_code, answer.json()["expected"]) == (403, "train")
    assert [page async for page in guarded.store.receipts()] == [[]]
    async with guarded.client(authorization="Bearer full") as client:
        assert (await client.post(url, params=group, json=body)).status_code == 200


@pytest.mark.parametrize("closed", [False, True])
async def test_metrics_are_public_unless_a_setting_closes_them(serve, closed):
    """Whether there are any is another matter: without a token 404 if it is public."""
    async with serve(token="full", read_token="read", metrics_token_required=closed) as service:
        for authorization, refused in ((None, closed), ("Bearer wrong", closed), ("Bearer read", False)):
            headers = {} if authorization is None else {"Authorization": authorization}
            async with service.client(**headers) as client:
                assert ((await client.get("/metrics")).status_code == 401) == refused


async def test_without_tokens_everybody_may_do_everything(serve):
    async with serve() as service, service.client(authorization="Bearer whatever") as client:
        assert (await client.put("/v1/layers/bn", json={"num_features": 2})).status_code == 201
        assert (await client.patch("/v1/layers/bn", json={"eps": 1e-3})).status_code == 200
        assert (await client.delete("/v1/layers/bn")).status_code == 204


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://test"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://test"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://test"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[", "Content-Type": "application/x-www-form-urlencoded"}, 403),
    ],
)
async def test_a_web_page_of_another_site_changes_nothing(serve, headers, status):
    """Seen: `fetch(url, {mode: "no-cors", method: "POST"})` from any page reset a layer, where there are no tokens."""
    async with serve() as service, service.client(host="test", **headers) as client, service.client() as other:
        (await other.put("/v1/layers/bn", json={"num_features": 2})).raise_for_status()
        before = (await other.get("/v1/layers/bn")).json()
        answer = await client.post("/v1/layers/bn/reset")
        assert answer.status_code == status, answer.text
        if status == 403:
            assert (name_of(answer), answer.json()["expected"]) == ("forbidden", "same-origin")
            assert (await other.get("/v1/layers/bn")).json() == before
        for path in ("/v1/layers/bn", "/v1/layers", "/v1/layers/bn/history"):
            assert (await client.get(path)).status_code == 200, "the browser does not show it to the page"


async def test_a_file_without_tokens_lets_nobody_in(serve, tmp_path):
    """All are revoked: that must not open the service."""
    path = tmp_path / "tokens"
    token, stored = add_token(path, Scope.ADMIN, "")
    revoke_token(path, stored.id)
    async with serve(tokens_file=path) as service, service.client(authorization=f"Bearer {token}") as client:
        for method, call in SCOPES:
            assert (await client.request(method, call.replace("{name}", "bn"))).status_code == 401


async def test_a_token_is_revoked_and_made_without_a_restart(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("batchnorm_service.tokens.file.CHECK_SECONDS", 0.0)
    path = tmp_path / "tokens"
    token, stored = add_token(path, Scope.TRAIN, "")
    async with serve(tokens_file=path) as service, service.client(authorization=f"Bearer {token}") as client:
        calls = [("PUT", "", {"num_features": 2}), ("POST", "/train", {"input": [[1, 2], [3, 5]]}), ("GET", "", None)]
        for _ in range(2):  # the second time from the cache of verified tokens
            for method, call, document in calls:
                answer = await client.request(method, f"/v1/layers/bn{call}", json=document)
                assert answer.status_code in {200, 201}
        revoke_token(path, stored.id)
        for method, call, document in calls:
            answer = await client.request(method, f"/v1/layers/bn{call}", json=document)
            assert answer.status_code == 401
        new, _ = add_token(path, Scope.READ, "")
        async with service.client(authorization=f"Bearer {new}") as reader:
            assert (await reader.get("/v1/layers/bn")).json()["num_batches_tracked"] == 2


@by_asgi
async def test_tokens_are_in_no_repr(guarded):
    assert "full" not in repr(guarded.gateway.app.state.settings)
    assert "full" not in repr(Guard("full", "read"))
