"""Drift in the list, on a layer's page and over time."""

import re

import numpy as np
import pytest

from batchnorm_service.ui.drift import _sparkline

from .conftest import text_of

pytestmark = pytest.mark.anyio

HERE = "/ui/layers/bn"


@pytest.fixture
async def drifting(page):
    """A layer that was trained, and then evaluated with other data in channel 1."""
    (await page.put("/v1/layers/bn", json={"num_features": 3})).raise_for_status()
    random = np.random.default_rng(0)
    for _ in range(60):
        batch = random.normal(size=(64, 3)).astype(np.float32)
        (await page.post("/v1/layers/bn/train", json={"input": batch.tolist()})).raise_for_status()
    for _ in range(20):
        batch = random.normal([0, 3, 0], size=(64, 3)).astype(np.float32)
        (await page.post("/v1/layers/bn/eval", json={"input": batch.tolist()})).raise_for_status()


async def test_the_page_says_what_the_call_says(page, drifting):
    call = (await page.get("/v1/layers/bn/drift", headers={"Accept": "*/*"})).json()
    assert call["drifting"]
    text = text_of(await page.get(HERE))
    assert "Drift began" in text
    assert "Channel 1 is farthest: its mean is shifted by" in text
    assert f"{call['batches']} batches compared" in text
    values = (await page.get(f"{HERE}/drift")).json()
    assert values["threshold"] == call["threshold"]
    assert values["score"] == pytest.approx(call["score"], rel=1e-5)  # what is stored is rounded
    assert values["z"] == pytest.approx(call["channels"]["z"], rel=1e-5)


async def test_over_time(page, drifting):
    """Within the first five seconds there is one column: with the largest score, and what was farthest from 0."""
    history = (await page.get(f"{HERE}/drift")).json()["history"]
    assert len(history["times"]) == len(history["scores"]) == len(history["shifts"]) >= 1
    assert history["group"] == 1
    assert max(column[1] for column in history["shifts"]) == pytest.approx(3, abs=0.4)
    assert max(history["scores"]) > 1


async def test_what_is_known_has_no_body(page, drifting):
    first = await page.get(f"{HERE}/drift")
    again = await page.get(f"{HERE}/drift", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_the_list(page, drifting):
    (await page.put("/v1/layers/quiet", json={"num_features": 3})).raise_for_status()
    answer = await page.get("/ui")
    rows = dict(re.findall(r'<tr id="row-(\w+)">(.*?)</tr>', answer.text, re.S))
    assert "drifting" in rows["bn"]
    assert "polyline" in rows["bn"]
    assert "polyline" not in rows["quiet"]


async def test_the_list_reads_no_more_than_so_many_channels(page, drifting, monkeypatch):
    monkeypatch.setattr("batchnorm_service.ui.drift.MAX_CHANNELS", 5)
    (await page.put("/v1/layers/a", json={"num_features": 3})).raise_for_status()
    assert "polyline" not in (await page.get("/ui")).text
    assert "polyline" in (await page.get("/ui?q=bn")).text


async def test_a_layer_without_batches(page):
    (await page.put("/v1/layers/bn", json={"num_features": 3})).raise_for_status()
    assert "No batch was compared yet" in text_of(await page.get(HERE))
    assert (await page.get(f"{HERE}/drift")).json()["history"]["times"] == []


async def test_a_kept_state_has_no_drift(page, drifting):
    (await page.put("/v1/layers/bn/pins/a", json={})).raise_for_status()
    assert 'id="drift"' not in (await page.get(f"{HERE}?at=a")).text


async def test_drift_that_is_not_measured_is_not_shown(serve):
    async with serve(drift=False) as service, service.client(Accept="text/html") as page:
        await page.put("/v1/layers/bn", json={"num_features": 3})
        assert "Drift" not in (await page.get("/ui")).text
        assert 'id="drift"' not in (await page.get(HERE)).text


def points_of(line):
    return [tuple(map(float, point.split(","))) for point in line.split()]


def test_a_sparkline():
    """The newest score is at the right; the threshold at half of the height of 20 with one above and below."""
    assert _sparkline([], 0.5) == ""
    points = points_of(_sparkline([0.0, 0.5, 1.0], 0.5))
    assert [height for _, height in points] == [19, 10, 1]
    assert points[-1][0] == 72
    assert [height for _, height in points_of(_sparkline([0.0, 4.0], 0.5))] == [19, 1]
    assert len(points_of(_sparkline([1.0], 0.5))) == 2  # a line needs two
    assert len(points_of(_sparkline([0.1] * 90, 0.5))) == 32
    assert points_of(_sparkline([0.1] * 90, 0.5))[0][0] == 0
