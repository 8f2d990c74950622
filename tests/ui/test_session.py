"""Login by a cookie that counts under /ui only, its form token, and scopes."""

import base64
import contextlib
import re

import pytest

from batchnorm_service.rest.security.cookies import MAX_TOKEN
from batchnorm_service.tokens import Scope, add_token, revoke_token

from .conftest import BROWSER, submit, text_of

pytestmark = pytest.mark.anyio

HERE = "/ui/layers/team1.bn"


@pytest.fixture(autouse=True)
def wrong_tokens_are_not_delayed(monkeypatch):
    monkeypatch.setattr("batchnorm_service.rest.security.failures.MAX_DELAY", 0.0)


@pytest.fixture
async def guarded(serve, tmp_path):
    """A service with a token of each scope, which are its attribute `tokens`, and two layers."""
    path = tmp_path / "tokens"
    tokens = {str(scope): add_token(path, scope, "") for scope in Scope}
    tokens["bound"] = add_token(path, Scope.ADMIN, "team1.")
    async with serve(tokens_file=path) as service:
        service.path, service.tokens = path, {name: token for name, (token, _) in tokens.items()}
        service.ids = {name: stored.id for name, (_, stored) in tokens.items()}
        async with service.client(authorization=f"Bearer {service.tokens['admin']}") as admin:
            for name in ("team1.bn", "team2.bn"):
                (await admin.put(f"/v1/layers/{name}", json={"num_features": 2})).raise_for_status()
                (await admin.post(f"/v1/layers/{name}/train", json={"input": [[1, 2], [3, 5]]})).raise_for_status()
        yield service


@contextlib.asynccontextmanager
async def logged_in(service, scope):
    async with service.client(**BROWSER) as browser:
        answer = await browser.post("/ui/login", data={"token": service.tokens[scope]})
        assert answer.status_code == 303, answer.text
        browser.cookies.clear()  # the two ways in call this host differently, so it would not be sent
        browser.headers["cookie"] = answer.headers["set-cookie"].partition(";")[0]
        yield browser


def led_to(answer):
    """Where a redirect leads, on this host; the two ways in call it differently."""
    assert answer.status_code == 303
    to = answer.url.join(answer.headers["location"])
    assert to.host == answer.url.host
    return to.raw_path.decode()


@pytest.mark.parametrize(
    ("path", "to"),
    [("/ui", ""), ("/ui?q=x", ""), (HERE, "/layers/team1.bn"), ("/ui/operations", "/operations"), ("/ui/nothing", "")],
)
async def test_a_browser_without_a_login_is_led_to_it_and_back(guarded, path, to):
    async with guarded.client(**BROWSER) as browser:
        answer = await browser.get(path)
        assert answer.status_code == 303
        login = await browser.get(answer.url.join(answer.headers["location"]))
        assert (login.status_code, login.url.path) == (200, "/ui/login")
        assert re.search(r'name="next" value="([^"]*)"', login.text)[1] == to
        done = await browser.post("/ui/login", data={"token": guarded.tokens["read"], "next": to})
        assert led_to(done) == f"/ui{to}"


async def test_a_script_is_told_that_the_login_is_over(guarded):
    async with guarded.client() as client:
        for path in ("/ui", f"{HERE}/values", "/ui/operations/figures"):
            answer = await client.get(path, headers={"Accept": "application/json"})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


async def test_the_cookie(guarded):
    async with guarded.client(**BROWSER) as browser:
        answer = await browser.post("/ui/login", data={"token": guarded.tokens["read"]})
        parts = answer.headers["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Lax"} <= set(parts)
        assert not {"Secure", "Path=/"} & set(parts)
        (cookie,) = browser.cookies.jar
        assert cookie.path == "/ui"
        proxied = await browser.post(
            "/ui/login", data={"token": guarded.tokens["read"]}, headers={"Origin": "https://test"}
        )
        assert "Secure" in proxied.headers["set-cookie"].split("; ")


async def test_the_cookie_counts_under_ui_only(guarded):
    name, value = b"batchnorm_token", base64.urlsafe_b64encode(guarded.tokens["admin"].encode())
    headers = {"Cookie": f"{name.decode()}={value.decode()}"}
    async with guarded.client() as client:
        for path in ("/ui", HERE, f"{HERE}/values", f"{HERE}/state", "/ui/operations"):
            assert (await client.get(path, headers=headers)).status_code == 200, path
        for path in (
            "/v1/layers",
            "/v1/layers/team1.bn",
            "/v1/state?prefix=team1",
            "/v2/models/team1.bn",
            "/nothing",
            "/uix",
        ):
            assert (await client.get(path, headers=headers)).status_code == 401, path
        assert (
            await client.post("/v1/layers/team1.bn/eval", json={"input": [[1, 2]]}, headers=headers)
        ).status_code == 401


@pytest.mark.parametrize("value", ["", "x", "%", "AAAA", "4pyT", base64.urlsafe_b64encode(b"wrong").decode()])
async def test_a_wrong_cookie_opens_nothing(guarded, value):
    async with guarded.client(**BROWSER, cookie=f"batchnorm_token={value}") as browser:
        answer = await browser.get("/ui")
        assert (answer.status_code, answer.headers["location"]) == (303, "ui/login?next=")
        assert (await browser.get("/ui", headers={"Accept": "*/*"})).status_code == 401
        assert (await browser.get("/ui/login")).status_code == 200


@pytest.mark.parametrize(("token", "status"), [("wrong", 401), ("", 422), (" ", 422), ("x" * (MAX_TOKEN + 1), 422)])
async def test_a_wrong_token_is_refused_in_words(guarded, token, status):
    async with guarded.client(**BROWSER) as browser:
        answer = await browser.post("/ui/login", data={"token": token, "next": "/layers/team1.bn"})
        assert answer.status_code == status
        assert "set-cookie" not in answer.headers
        assert 'role="alert"' in answer.text
        assert re.search(r'name="next" value="([^"]*)"', answer.text)[1] == "/layers/team1.bn"


async def test_a_wrong_token_is_counted_and_delayed(guarded):
    before = guarded.gateway.guard.failures.total
    async with guarded.client(**BROWSER) as browser:
        await browser.post("/ui/login", data={"token": "wrong"})
        assert guarded.gateway.guard.failures.total == before + 1
        await browser.post("/ui/login", data={"token": guarded.tokens["read"]})
        assert guarded.gateway.guard.failures.total == before + 1


@pytest.mark.parametrize(
    "to",
    [
        *("https://elsewhere", "//elsewhere", "/\\elsewhere", "elsewhere", "/a b", "/x\r\nSet-Cookie: a=b", "?q=<x>"),
        *("/..", "/../docs", "/layers/../../docs", "/..?q=x", "/."),
    ],
)
async def test_a_login_leads_nowhere_else(guarded, to):
    async with guarded.client(**BROWSER) as browser:
        answer = await browser.post("/ui/login", data={"token": guarded.tokens["read"], "next": to})
        assert led_to(answer) == "/ui"


async def test_logout(guarded):
    async with logged_in(guarded, "read") as browser:
        answer = await submit(browser, "/ui/logout", of="/ui")
        assert (answer.status_code, answer.headers["location"]) == (303, "../ui/login")
        cookie, *rest = answer.headers["set-cookie"].split("; ")
        assert "Max-Age=0" in rest
        assert (await browser.get("/ui", headers={"Cookie": cookie})).status_code == 303


async def test_a_revoked_token_is_logged_out(guarded, monkeypatch):
    monkeypatch.setattr("batchnorm_service.tokens.file.CHECK_SECONDS", 0.0)
    async with logged_in(guarded, "read") as browser:
        assert (await browser.get("/ui")).status_code == 200
        revoke_token(guarded.path, guarded.ids["read"])
        assert (await browser.get("/ui")).status_code == 303


@pytest.mark.parametrize(
    ("action", "fields"),
    [("reset", {"what": "all"}), ("rollback", {"version": "1"}), ("pin", {"tag": "a"}), ("unpin", {"tag": "a"})],
)
async def test_a_form_needs_the_token_of_its_page(guarded, action, fields):
    async with logged_in(guarded, "admin") as browser, guarded.client() as admin:
        admin.headers["authorization"] = f"Bearer {guarded.tokens['admin']}"
        before = (await admin.get("/v1/layers/team1.bn")).json()
        for wrong in ({}, {"form_token": ""}, {"form_token": "0" * 64}):
            answer = await browser.post(f"{HERE}/{action}", data={**fields, **wrong})
            assert answer.status_code == 403
            assert "not of this login" in text_of(answer)
        assert (await admin.get("/v1/layers/team1.bn")).json() == before
        async with logged_in(guarded, "bound") as other:
            foreign = re.search(r'data-form-token="(\w+)"', (await other.get("/ui")).text)[1]
        assert (await browser.post(f"{HERE}/{action}", data={**fields, "form_token": foreign})).status_code == 403
        answer = await submit(browser, f"{HERE}/{action}", of=HERE, **fields)
        assert answer.status_code == (404 if action in {"unpin", "rollback"} else 303)


async def test_a_batch_needs_the_token_of_its_page(guarded):
    async with logged_in(guarded, "read") as browser:
        batch = {"input": [[1, 2]]}
        assert (await browser.post(f"{HERE}/histogram", json=batch)).status_code == 403
        token = re.search(r'data-form-token="(\w+)"', (await browser.get(HERE)).text)[1]
        assert (await browser.post(f"{HERE}/histogram", json=batch, headers={"X-Form-Token": token})).status_code == 200


@pytest.mark.parametrize(
    ("scope", "there", "not_there"),
    [
        ("read", ["Download"], ["pin-dialog", "reset-dialog", "rollback-dialog"]),
        ("train", ["pin-dialog"], ["reset-dialog", "rollback-dialog", "unpin-dialog"]),
        ("admin", ["pin-dialog", "reset-dialog", "rollback-dialog", "unpin-dialog"], []),
    ],
)
async def test_a_page_offers_what_the_scope_allows(guarded, scope, there, not_there):
    async with logged_in(guarded, scope) as browser:
        text = (await browser.get(HERE)).text
        assert all(part in text for part in there)
        assert not any(part in text for part in not_there)
        assert f"Logged in with scope {scope}" in text


async def test_a_prefix_hides_other_layers(guarded):
    async with logged_in(guarded, "bound") as browser:
        page = (await browser.get("/ui")).text
        assert "team1.bn" in page
        assert "team2.bn" not in page
        for query in ("?q=team2", "?q=bn&match=contains", "?sort=version&order=desc", "?after=team0"):
            assert "row-team2.bn" not in (await browser.get(f"/ui{query}")).text, query
        for path in ("/ui/layers/team2.bn", "/ui/layers/team2.bn/values", "/ui/layers/team2.bn/state"):
            assert (await browser.get(path)).status_code == 404
        assert (await submit(browser, "/ui/layers/team2.bn/reset", of="/ui", what="all")).status_code == 404
        assert (await submit(browser, "/ui/example", of="/ui")).status_code == 303
        assert "row-team1.example.observations" in (await browser.get("/ui")).text


@pytest.mark.parametrize("to", ["/layers/..bn", "/layers/a..b", "/layers/a.", "/layers/-.."])
async def test_a_name_with_dots_is_no_way_up(guarded, to):
    async with guarded.client(**BROWSER) as browser:
        answer = await browser.post("/ui/login", data={"token": guarded.tokens["read"], "next": to})
        assert led_to(answer) == f"/ui{to}"


async def test_an_example_whose_names_would_be_too_long_is_refused(serve, tmp_path):
    """They were cut, and two layers with different configs had one name."""
    token, _ = add_token(tmp_path / "tokens", Scope.ADMIN, "x" * 190)
    async with serve(tokens_file=tmp_path / "tokens") as service, service.client() as client:
        client.headers["authorization"] = f"Bearer {token}"
        answer = await submit(client, "/ui/example")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request")
        assert (await client.get("/v1/layers")).json()["layers"] == []


async def test_figures_that_need_a_token_are_not_for_one_with_a_prefix(serve, tmp_path):
    bound, _ = add_token(tmp_path / "tokens", Scope.READ, "team1.")
    free, _ = add_token(tmp_path / "tokens", Scope.READ, "")
    async with (
        serve(tokens_file=tmp_path / "tokens", metrics_token_required=True) as service,
        service.client() as client,
    ):
        for path in ("/ui/operations", "/ui/operations/figures"):
            for token, status in ((bound, 404), (free, 200)):
                answer = await client.get(path, headers={"Authorization": f"Bearer {token}"})
                assert answer.status_code == status, (path, token)


async def test_without_tokens_there_is_nothing_to_log_in_to(page):
    assert "has no tokens" in text_of(await page.get("/ui/login"))
    assert "Log out" not in (await page.get("/ui")).text
