"""What every page has: a policy that allows nothing inline or from elsewhere, and files of this package only."""

import re

import pytest

from batchnorm_service.ui.rendering import FOLDER, base_of

from .conftest import text_of

pytestmark = pytest.mark.anyio

PATHS = [
    "/ui",
    "/ui?q=none",
    "/ui/login",
    "/ui/layers/layer1.0.bn1",
    "/ui/operations",
    "/ui/layers/nothing",
    "/ui/nothing",
]


@pytest.mark.parametrize("path", PATHS)
async def test_a_page_loads_files_of_this_service_only(page, layer, path):
    answer = await page.get(path)
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["form-action"] == "'self'"
    assert "unsafe" not in str(policy)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*src)|<style|\sstyle=|\son\w+=", answer.text)  # the policy would block them
    loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="([^"]*)"', answer.text)
    assert len(loaded) >= 4
    for file in loaded:
        assert "//" not in file
        assert (await page.get(answer.url.join(file))).status_code == 200, file
    assert "text/html" in answer.headers["content-type"]
    assert text_of(answer)


async def test_every_link_of_a_page_leads_somewhere(page, layer):
    for path in PATHS[:5]:
        answer = await page.get(path)
        for link in set(re.findall(r'<a[^>]* href="([^"#]+)"', answer.text)):
            target = answer.url.join(link.replace("&amp;", "&"))
            assert (await page.get(target)).status_code in {200, 307}, (path, link)


async def test_scripts_and_styles_load_nothing_from_elsewhere(page):
    for file in (FOLDER / "static").iterdir():
        if file.suffix in {".js", ".css"}:
            text = file.read_text()
            assert not re.search(r"@import|url\((?!inter\.woff2)|eval\(|new Function|innerHTML", text), file.name
            assert not re.findall(r"https?://(?!github\.com/leeoniya/uPlot|\$\{)", text), file.name


@pytest.mark.parametrize("name", sorted(file.name for file in (FOLDER / "static").iterdir()))
async def test_a_file_is_asked_for_again_without_being_sent_again(page, name):
    answer = await page.get(f"/ui/static/{name}")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-cache")
    again = await page.get(f"/ui/static/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["page.py", "..%2Frendering.py", "../rendering.py", "page.css/x", "PAGE.css", "%2Fetc%2Fpasswd", ""]
)
async def test_other_files_are_not_served(page, path):
    assert (await page.get(f"/ui/static/{path}")).status_code == 404


async def test_without_the_page(serve):
    async with serve(ui=False) as service, service.client(Accept="text/html") as client:
        for path in ("/ui", "/ui/login", "/ui/static/page.css", "/ui/layers/x"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")
        assert (await client.get("/", headers={"Accept": "text/html"})).headers["location"] == "docs"
        assert "ui" not in (await client.get("/", headers={"Accept": "*/*"})).json()


@pytest.mark.parametrize(
    ("path", "base"), [("/ui", "ui"), ("/ui/", "../ui"), ("/ui/login", "../ui"), ("/ui/layers/x", "../../ui")]
)
def test_references_are_relative_so_that_a_proxy_may_put_a_folder_before(path, base):
    import httpx  # noqa: PLC0415

    assert base_of(path) == base
    assert str(httpx.URL(f"http://host/folder{path}").join(base)) == "http://host/folder/ui"


async def test_the_method_that_a_page_has_not(page, layer):
    answer = await page.get("/ui/layers/layer1.0.bn1/reset")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "Back to the layer" in text_of(answer)
