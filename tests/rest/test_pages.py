"""Pages for people: the first one, and the documentation, which needs no other host."""

import re

import pytest

from batchnorm_service import __version__

pytestmark = pytest.mark.anyio

BROWSERS = {
    "firefox": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "chromium": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
    "html alone": "text/html",
}


@pytest.mark.parametrize("accept", BROWSERS.values(), ids=BROWSERS)
@pytest.mark.parametrize("page", ["/ui", "/docs"])
async def test_a_browser_is_sent_to_the_page_or_the_documentation(serve, accept, page):
    async with serve(ui=page == "/ui") as service, service.client() as client:
        answer = await client.get("/", headers={"Accept": accept}, follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, page)
    assert answer.headers["content-type"].startswith("text/html")
    (redirect,) = answer.history
    assert redirect.headers["vary"] == "accept"


@pytest.mark.parametrize("accept", [None, "*/*", "application/json", "application/json, text/html;q=0.5", "image/png"])
async def test_others_are_told_what_this_is(client, accept):
    client.headers.pop("Accept")
    answer = await client.get("/", headers={} if accept is None else {"Accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.headers["vary"] == "accept"
    about = answer.json()
    assert (about["name"], about["version"]) == ("batchnorm-service", __version__)
    links = [value for value in about.values() if value.startswith("/")]
    assert {"/ui", "/docs", "/openapi.json", "/healthz", "/readyz"} <= set(links)
    for link in links:
        assert (await client.get(link)).status_code == 200


async def test_the_documentation_loads_nothing_from_another_host(client):
    """The page came with Swagger UI's files from a content delivery network: blank without one."""
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    files = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert {"docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "docs/start.js"} <= set(files)
    for name in files:
        assert "//" not in name
        if not name.startswith("data:"):
            answer = await client.get(str(page.url.join(name)))
            assert answer.status_code == 200, name
    start = (await client.get("/docs/start.js")).text
    assert 'url: "openapi.json"' in start
    assert "//" not in start
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"<script>|<style>|\son\w+=", page.text)  # the policy would block them


@pytest.mark.parametrize(
    ("path", "kind"),
    [("swagger-ui-bundle.js", "text/javascript"), ("swagger-ui.css", "text/css"), ("start.js", "text/javascript")],
)
async def test_the_files_of_the_documentation(client, path, kind):
    answer = await client.get(f"/docs/{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
    assert answer.headers["x-content-type-options"] == "nosniff"
    head = await client.head(f"/docs/{path}")
    assert head.headers["content-length"] == answer.headers["content-length"] == str(len(answer.content))
    assert (await client.get(f"/docs/{path}?v=1")).json()["type"] == "/problems/invalid-request"


@pytest.mark.parametrize("path", ["/docs/", "/docs/redoc.standalone.js", "/docs/..%2F__init__.py", "/docs/../core.py"])
async def test_other_files_of_the_wheel_are_not_served(client, path):
    assert (await client.get(path)).status_code == 404
