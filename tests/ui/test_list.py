"""The list of layers: search, order, pages, and the first visit."""

import re

import anyio
import pytest

from batchnorm_service.ui import search as search_module
from batchnorm_service.ui.search import Search, find_layers

from .conftest import submit, text_of

pytestmark = pytest.mark.anyio

CHANNELS = {"net.a": 2, "net.b": 8, "net.c": 4, "other.net": 16}


@pytest.fixture
async def layers(page):
    for name, channels in CHANNELS.items():
        (await page.put(f"/v1/layers/{name}", json={"num_features": channels})).raise_for_status()


def names(answer):
    assert answer.status_code == 200, answer.text
    return re.findall(r'<tr id="row-([^"]+)"', answer.text)


async def test_the_first_visit_offers_an_example(page):
    first = await page.get("/ui")
    assert "No layers yet" in text_of(first)
    assert 'action="ui/example"' in first.text
    assert "curl -X PUT http://test/v1/layers/obs" in text_of(first).replace("127.0.0.1", "test")
    loaded = await submit(page, "/ui/example")
    assert (loaded.status_code, loaded.headers["location"]) == (303, "../ui?done=example")
    after = await page.get("/ui?done=example")
    assert names(after) == ["example.encoder.bn1", "example.encoder.bn2", "example.observations"]
    assert "The example is loaded" in text_of(after)


async def test_an_example_that_is_loaded_twice_is_there_once(page):
    for _ in range(2):
        assert (await submit(page, "/ui/example")).status_code == 303
    for name, batches in (("example.encoder.bn1", 24), ("example.observations", 24)):
        assert (await page.get(f"/v1/layers/{name}")).json()["num_batches_tracked"] == batches
    pins = (await page.get("/v1/layers/example.encoder.bn1/pins")).json()["pins"]
    assert [pin["tag"] for pin in pins] == ["baseline"]


async def test_an_example_counts_as_a_running_call(serve, monkeypatch):
    async with serve(max_concurrent_requests=1) as service, service.client() as client:
        listing, began, release = service.layers.list, anyio.Event(), anyio.Event()

        async def slow(*arguments):
            began.set()
            await release.wait()
            return await listing(*arguments)

        monkeypatch.setattr(service.layers, "list", slow)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.get, "/v1/layers")
            await began.wait()
            answer = await client.post("/ui/example", data={"form_token": ""})
            release.set()
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/overloaded")
        assert (await client.get("/v1/layers")).json()["layers"] == []


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", ["net.a", "net.b", "net.c", "other.net"]),
        ("?q=net", ["net.a", "net.b", "net.c"]),
        ("?q=net&match=contains", ["net.a", "net.b", "net.c", "other.net"]),
        ("?q=NET.A&match=contains", ["net.a"]),
        ("?q=%20net.b%20", ["net.b"]),
        ("?sort=channels&order=desc", ["other.net", "net.b", "net.c", "net.a"]),
        ("?sort=channels", ["net.a", "net.c", "net.b", "other.net"]),
        ("?sort=name&order=desc", ["other.net", "net.c", "net.b", "net.a"]),
        ("?sort=channels&order=desc&q=net&limit=2", ["net.b", "net.c"]),
        ("?sort=channels&order=desc&q=net&limit=2&skip=2", ["net.a"]),
        ("?limit=2", ["net.a", "net.b"]),
        ("?limit=2&after=net.b", ["net.c", "other.net"]),
        ("?q=nothing", []),
    ],
)
async def test_search_and_order(page, layers, query, found):
    assert names(await page.get(f"/ui{query}")) == found


async def test_pages_follow_each_other(page, layers):
    """Each link leads to the next page, until there is none."""
    for start in ("/ui?limit=1", "/ui?limit=1&q=net&match=contains", "/ui?limit=1&sort=version&order=desc"):
        seen, path = [], start
        while path:
            answer = await page.get(path)
            seen += names(answer)
            following = re.search(r'rel="next" href="([^"]+)"', answer.text)
            path = following and "/" + following[1].replace("&amp;", "&")
        assert sorted(seen) == sorted(CHANNELS), start


@pytest.mark.parametrize(
    "query", ["?sort=size", "?order=up", "?limit=0", "?limit=501", "?skip=-1", "?match=all", "?x=1"]
)
async def test_what_is_refused_is_explained(page, query):
    answer = await page.get(f"/ui{query}")
    assert answer.status_code == 422
    assert query[1:].partition("=")[0] in text_of(answer).lower()


class Many:
    """As many layers as are asked for, and how many of them were read."""

    def __init__(self, layers, count):
        self.count, self.read, self.one = count, 0, layers[0]

    async def list(self, prefix, after, limit):
        numbers = [number for number in range(self.count) if f"l{number:06}" > after][:limit]
        self.read += len(numbers)
        layers = [self.one.model_copy(update={"name": f"l{number:06}", "version": number}) for number in numbers]
        more = bool(numbers) and numbers[-1] + 1 < self.count
        return type("Page", (), {"layers": layers, "next": layers[-1].name if more else None})


async def test_a_page_reads_a_bounded_number_of_layers(service, layers, monkeypatch):
    """However many there are: by name one page, otherwise at most MAX_READ."""
    monkeypatch.setattr(search_module, "MAX_READ", 3000)
    some = (await service.layers.list("", "", 1)).layers
    from batchnorm_service.tokens import EVERYTHING  # noqa: PLC0415

    for search, most in (
        (Search(), 50),
        (Search(after="l004000"), 50),
        (Search("x", "contains"), 3000),
        (Search("l00", "contains"), 250),
        (Search(sort="version", order="desc"), 3000),
    ):
        many = Many(some, 8000)
        found = await find_layers(many, EVERYTHING, search)
        assert many.read <= most, search
        assert not found.complete
        assert found.read <= most


async def test_an_unfinished_search_goes_on(service, layers, monkeypatch):
    monkeypatch.setattr(search_module, "MAX_READ", 2000)
    from batchnorm_service.tokens import EVERYTHING  # noqa: PLC0415

    many, after, found = Many((await service.layers.list("", "", 1)).layers, 5500), "", []
    for _ in range(3):
        part = await find_layers(many, EVERYTHING, Search("5499", "contains", after=after))
        found += [layer.name for layer in part.layers]
        after = part.next
    assert (found, after) == (["l005499"], None)


async def test_an_order_without_a_match_among_the_first_names_goes_on_by_name(page, layers, monkeypatch):
    """It linked to itself, and a script followed that link, again and again."""
    monkeypatch.setattr(search_module, "MAX_READ", 2)
    monkeypatch.setattr(search_module, "_PAGE", 2)
    answer = await page.get("/ui?q=other&match=contains&sort=channels&order=desc")
    assert "data-continue" not in answer.text
    assert "Among the first 2 names" in text_of(answer)
    on = re.search(r'href="([^"]+)">Search the others', answer.text)[1].replace("&amp;", "&")
    assert names(await page.get(f"/{on}")) == ["other.net"]


@pytest.mark.parametrize("query", ["sort=channels", "order=desc", "q=net&match=contains"])
async def test_searches_take_turns_and_others_do_not_wait(service, page, layers, monkeypatch, query):
    """60 at once kept a GET of a layer waiting for half a minute, because each read 250 names in each turn."""
    listing, release, reading, most = service.layers.list, anyio.Event(), 0, 0

    async def slow(prefix, after, limit):
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        await release.wait()
        reading -= 1
        return await listing(prefix, after, limit)

    answers, two = [], anyio.Event()

    async def search():
        answers.append(await page.get(f"/ui?{query}"))
        if len(answers) == 2:
            two.set()

    async with anyio.create_task_group() as tasks:
        monkeypatch.setattr(service.layers, "list", slow)
        for _ in range(search_module.MAX_SCANS + 2):
            tasks.start_soon(search)
        with anyio.fail_after(10):
            await two.wait()
        assert [answer.status_code for answer in answers] == [503, 503]
        assert "The service is busy" in text_of(answers[0])
        assert (await page.get("/ui/layers/net.a")).status_code == 200
        release.set()
    assert most == 1
    assert [answer.status_code for answer in answers[2:]] == [200] * search_module.MAX_SCANS
    assert (await page.get(f"/ui?{query}")).status_code == 200


async def test_a_refresh_of_what_is_known_has_no_body(page, layers):
    first = await page.get("/ui")
    again = await page.get("/ui", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    (await page.post("/v1/layers/net.a/train", json={"input": [[1, 2], [3, 4]]})).raise_for_status()
    assert (await page.get("/ui", headers={"If-None-Match": first.headers["etag"]})).status_code == 200


async def test_the_slash_at_the_end(page):
    answer = await page.get("/ui/")
    assert answer.url.join(answer.headers["location"]).path == "/ui"
