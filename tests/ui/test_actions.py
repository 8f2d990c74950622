"""Reset, rollback, pin and unpin by forms; what other sites and other pages send is refused."""

import pytest

from batchnorm_client.wire.errors import StoreUnavailable

from .conftest import submit, text_of

pytestmark = pytest.mark.anyio

HERE = "/ui/layers/layer1.0.bn1"


@pytest.mark.parametrize("what", ["running_stats", "parameters", "all"])
async def test_reset(page, layer, what):
    (await page.patch(layer, json={"weight": [5, 5]})).raise_for_status()
    answer = await submit(page, f"{HERE}/reset", what=what)
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        f"../../..{HERE}?done=reset-{what}",
    )
    assert str(answer.url.join(answer.headers["location"])).endswith(f"{HERE}?done=reset-{what}")
    state = (await page.get(layer)).json()
    assert (state["num_batches_tracked"] == 0) == (what != "parameters")
    assert state["weight"] == ([5, 5] if what == "running_stats" else [1, 1])
    assert "initial values again" in text_of(await page.get(f"{HERE}?done=reset-{what}")) or what == "running_stats"


async def test_a_form_that_is_sent_twice_counts_once(page, layer):
    for _ in range(2):
        assert (await submit(page, f"{HERE}/reset", what="all", key="page-1")).status_code == 303
    assert (await page.get(layer)).json()["version"] == 3


async def test_a_form_that_the_store_did_not_answer_may_have_been_done(service, page, layer, monkeypatch):
    """The page said that nothing is lost, and to try again."""

    async def unanswered(*_):
        raise StoreUnavailable("the store did not answer")

    monkeypatch.setattr(service.layers, "reset", unanswered)
    answer = await submit(page, f"{HERE}/reset", what="all")
    assert answer.status_code == 503
    assert "A change may have been made" in text_of(answer)


async def test_rollback(page, layer):
    before = (await page.get(layer)).json()
    (await page.put(f"{layer}/pins/good", json={})).raise_for_status()
    for to in ({"version": "2"}, {"tag": "good"}, {"version": "2", "tag": ""}):
        (await page.post(f"{layer}/reset")).raise_for_status()
        assert (await submit(page, f"{HERE}/rollback", **to)).status_code == 303
        after = (await page.get(layer)).json()
        assert (after["digest"], after["num_batches_tracked"]) == (before["digest"], 1)


async def test_pin_and_unpin(page, layer):
    assert (await submit(page, f"{HERE}/pin", tag="release-1", version="")).status_code == 303
    assert (await submit(page, f"{HERE}/pin", tag="release-2", version="2")).status_code == 303
    assert [pin["version"] for pin in (await page.get(f"{layer}/pins")).json()["pins"]] == [2, 2]
    (await page.post(f"{layer}/reset")).raise_for_status()
    refused = await submit(page, f"{HERE}/pin", tag="release-1")
    assert refused.status_code == 409
    assert "Choose another tag" in text_of(refused)
    assert (await submit(page, f"{HERE}/unpin", tag="release-1")).status_code == 303
    assert [pin["tag"] for pin in (await page.get(f"{layer}/pins")).json()["pins"]] == ["release-2"]


@pytest.mark.parametrize(
    ("action", "fields", "field"),
    [
        ("reset", {"what": "everything"}, "what"),
        ("reset", {"what": "all", "version": "2"}, "version"),
        ("reset", {"what": "all", "key": "two words"}, "Idempotency-Key"),
        ("rollback", {"tag": ""}, "version"),
        ("rollback", {"version": "2", "tag": "good"}, "version"),
        ("rollback", {"version": "two"}, "version"),
        ("rollback", {"version": "18446744073709551616"}, "version"),  # 500: no number of JSON
        ("rollback", {"version": "9" * 5000}, "version"),  # 500: more digits than `int` takes
        ("pin", {"tag": "ok", "version": "9" * 5000}, "version"),
        ("pin", {"tag": "17"}, "tag"),
        ("pin", {"tag": ""}, "tag"),
        ("pin", {"tag": "x" * 201}, "tag"),
        ("pin", {"tag": "ok", "version": "-1"}, "version"),
        ("unpin", {"tag": "a b"}, "tag"),
    ],
)
async def test_a_wrong_form_is_explained_and_changes_nothing(page, layer, action, fields, field):
    before = (await page.get(layer)).json()
    answer = await page.post(f"{HERE}/{action}", data=fields, headers={"Accept": "application/json"})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request"), answer.text
    assert field in answer.json()["detail"] or field in answer.json()["field"]
    assert (await page.get(layer)).json() == before
    assert (await page.get(f"{layer}/pins")).json() == {"pins": []}


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"what=all&what=all", "application/x-www-form-urlencoded", 422),
        (b"what=%ff", "application/x-www-form-urlencoded", 422),
        (b"what", "application/x-www-form-urlencoded", 422),
        (b"what=" + b"x" * 20_000, "application/x-www-form-urlencoded", 413),
        (b'{"what": "all"}', "application/json", 415),
        (b"what=all", "text/plain", 415),
    ],
)
async def test_what_is_no_form_is_refused(page, layer, body, kind, status):
    answer = await page.post(f"{HERE}/reset", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert (await page.get(layer)).json()["version"] == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://elsewhere"},
        {"Origin": "null"},
    ],
)
@pytest.mark.parametrize("path", [f"{HERE}/reset", "/ui/example", "/ui/login", "/ui/logout"])
async def test_other_sites_change_nothing(page, layer, headers, path):
    answer = await page.post(path, data={"what": "all"}, headers=headers)
    assert answer.status_code == 403
    assert (await page.get(layer)).json()["version"] == 2
    assert len((await page.get("/v1/layers")).json()["layers"]) == 1
