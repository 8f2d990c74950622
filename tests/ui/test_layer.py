"""A layer's page, its values and its state."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load

from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.ui.vectors import MAX_POINTS, chart_data, summaries

from .conftest import text_of

pytestmark = pytest.mark.anyio

NAME = "layer1.0.bn1"


async def test_the_page_says_what_the_layer_is(page, layer):
    answer = await page.get(f"/ui/layers/{NAME}")
    assert answer.status_code == 200
    text = text_of(answer)
    for part in (NAME, "2 channels", "moving statistics, momentum 0.1", "Samples per channel 3", "num_features 2"):
        assert part in text, part
    assert (await page.get(layer)).json()["digest"] in text
    assert f"curl http://test/v1/layers/{NAME}/eval" in text.replace("127.0.0.1:8000", "test")


@pytest.mark.parametrize("host", ["batchnorm_service:8000", "bn.example", "[::1]:8000"])
async def test_examples_name_the_host_that_the_reader_used(page, layer, host):
    answer = await page.get(f"/ui/layers/{NAME}", headers={"Host": host})
    assert f"curl http://{host}/v1/layers/{NAME}/eval" in text_of(answer)


async def test_values_for_charts(page, layer):
    """The batch was [[1, 2], [3, 4], [5, 9]]: mean 3 and 5, unbiased variance 4 and 13, momentum 0.1."""
    answer = await page.get(f"/ui/layers/{NAME}/values")
    values = answer.json()
    assert (values["channels"], values["step"]) == (2, 1)
    series = {name: each["low"] for name, each in values["series"].items()}
    assert series["mean"] == pytest.approx([0.3, 0.5])
    assert series["std"] == pytest.approx([(0.9 + 0.4) ** 0.5, (0.9 + 1.3) ** 0.5])
    assert (series["weight"], series["bias"]) == ([1, 1], [0, 0])
    assert series["lower"] == pytest.approx(np.subtract(series["mean"], series["std"]))
    again = await page.get(f"/ui/layers/{NAME}/values", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    await page.post(f"{layer}/reset")
    changed = await page.get(f"/ui/layers/{NAME}/values", headers={"If-None-Match": answer.headers["etag"]})
    assert changed.json()["series"]["mean"]["low"] == [0, 0]


async def test_a_kept_state(page, layer):
    """The state before the reset is at version 2; everything of the page is then of that state."""
    (await page.put(f"{layer}/pins/before", json={})).raise_for_status()
    (await page.post(f"{layer}/reset")).raise_for_status()
    for at in ("2", "before"):
        answer = await page.get(f"/ui/layers/{NAME}?at={at}")
        assert f"You see the kept state {at}" in text_of(answer)
        assert f"values?at={at}" in answer.text
        values = (await page.get(f"/ui/layers/{NAME}/values?at={at}")).json()
        assert (values["version"], values["series"]["mean"]["low"]) == (2, pytest.approx([0.3, 0.5]))
        state = await page.get(f"/ui/layers/{NAME}/state?at={at}")
        assert load(state.content)["running_mean"] == pytest.approx([0.3, 0.5])
        assert f"{NAME}@{at}.safetensors" in state.headers["content-disposition"]
        assert (state.headers["cache-control"], state.headers["x-content-type-options"]) == (
            "private, no-cache",
            "nosniff",
        )
    assert (await page.get(f"/ui/layers/{NAME}?at=77")).status_code == 404


async def test_the_state_is_that_of_the_call(page, layer):
    answer, call = (
        await page.get(f"/ui/layers/{NAME}/state"),
        await page.get(f"{layer}/state", headers={"Accept": "*/*"}),
    )
    assert answer.content == call.content
    assert answer.headers["etag"] == call.headers["etag"]
    assert answer.headers["content-disposition"] == f'attachment; filename="{NAME}.safetensors"'


async def test_history_and_pins(page, layer):
    (await page.put(f"{layer}/pins/release-1", json={})).raise_for_status()
    (await page.post(f"{layer}/reset")).raise_for_status()
    answer = await page.get(f"/ui/layers/{NAME}")
    assert re.findall(r'<tr id="state-(\d+)"', answer.text) == ["3", "2"]
    text = text_of(answer)
    assert "2 release-1 train" in text
    assert "release-1 version 2, pinned" in text


@pytest.mark.parametrize(
    ("config", "there", "not_there"),
    [
        ({"affine": False}, "Running mean", "\N{GREEK SMALL LETTER GAMMA}"),
        ({"track_running_stats": False}, "Weight", "Running mean"),
        ({"track_running_stats": False, "affine": False}, "keeps neither", "Running mean"),
        ({"statistics": "population", "momentum": None}, "population statistics ·", "momentum 0.1"),
        ({"momentum": None}, "momentum cumulative", "momentum 0.1"),
    ],
)
async def test_what_a_layer_does_not_have_is_not_shown(page, config, there, not_there):
    (await page.put("/v1/layers/x", json={"num_features": 3, **config})).raise_for_status()
    text = text_of(await page.get("/ui/layers/x"))
    assert there in text
    assert not_there not in text
    assert (await page.get("/ui/layers/x/values")).status_code == 200


async def test_values_that_are_not_finite(page):
    (await page.put("/v1/layers/x", json={"num_features": 3, "non_finite": "allow"})).raise_for_status()
    batch = {"input": [["NaN", 1, "Infinity"], [2, 3, 4]]}
    (await page.post("/v1/layers/x/train", json=batch)).raise_for_status()
    assert "2 not finite" in text_of(await page.get("/ui/layers/x"))
    values = json.loads((await page.get("/ui/layers/x/values")).text)
    assert values["series"]["mean"]["low"][0] is None


async def test_what_a_layer_is_called_is_not_markup(page):
    """A name cannot have any; a detail repeats whatever was sent."""
    answer = await page.get("/ui/layers/x?at=<script>alert(1)</script>")
    assert answer.status_code == 422
    assert "<script>alert" not in answer.text
    answer = await page.get("/ui/layers/<script>")
    assert answer.status_code == 422
    assert "<script>" not in answer.text


async def test_a_layer_that_does_not_exist(page):
    answer = await page.get("/ui/layers/nothing")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "No such layer" in text_of(answer)
    script = await page.get("/ui/layers/nothing", headers={"Accept": "application/json"})
    assert script.json()["type"] == "/problems/layer-not-found"


def test_a_layer_of_very_many_channels_is_drawn_in_groups():
    channels = 2 * MAX_POINTS + 3
    mean = np.zeros(channels, np.float32)
    mean[5], mean[-1] = 7, -9
    tensors = {"running_mean": Tensor.of(mean), "running_var": Tensor.of(np.ones(channels, np.float32))}
    data = chart_data(tensors)
    low, high = data["series"]["mean"]["low"], data["series"]["mean"]["high"]
    assert data["step"] == 3
    assert len(low) == len(high) == -(-channels // 3) <= MAX_POINTS
    assert (high[1], low[1], low[-1]) == (7, 0, -9)
    assert data["series"]["upper"]["high"][1] == 8
    (first, _) = summaries(tensors)
    assert (first.low, first.low_at, first.high, first.high_at) == (-9, channels - 1, 7, 5)
