"""A batch before and after normalization."""

import io
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save

from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.ui.batch import BINS, histogram

pytestmark = pytest.mark.anyio

HERE = "/ui/layers/layer1.0.bn1/histogram"
BATCH = np.array([[1, 2], [3, 4], [5, 9], [7, 1]], np.float32)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


FORMS = {
    "application/x-npy": npy(BATCH),
    "application/vnd.safetensors": save({"input": BATCH}),
    "application/json": b'{"input": [[1, 2], [3, 4], [5, 9], [7, 1]]}',
}


@pytest.mark.parametrize("form", FORMS)
async def test_a_batch_in_each_form(page, layer, form):
    """As eval has it, whose output is asked for beside it; nothing changes."""
    before = (await page.get(layer)).json()
    answer = await page.post(HERE, content=FORMS[form], headers={"Content-Type": form})
    assert answer.status_code == 200, answer.text
    document = answer.json()
    output = np.array((await page.post(f"{layer}/eval", json={"input": BATCH.tolist()})).json()["output"])
    assert (document["shape"], document["dtype"], document["version"]) == ([4, 2], "float32", 2)
    for name, values in (("before", BATCH), ("after", output)):
        part = document[name]
        assert sum(part["counts"]) == part["values"] == values.size
        assert len(part["edges"]) == len(part["counts"]) + 1
        assert part["mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert part["std"] == pytest.approx(values.std(), rel=1e-5)
        assert (part["edges"][0], part["edges"][-1]) == pytest.approx((values.min(), values.max()), rel=1e-5)
    assert (await page.get(layer)).json() == before


async def test_one_channel(page, layer):
    answer = await page.post(f"{HERE}?channel=1", json={"input": BATCH.tolist()})
    assert answer.json()["before"]["values"] == 4
    assert answer.json()["before"]["mean"] == 4
    refused = await page.post(f"{HERE}?channel=2", json={"input": BATCH.tolist()}, headers={"Accept": "*/*"})
    assert (refused.status_code, refused.json()["field"]) == (422, "channel")


async def test_a_kept_state(page, layer):
    (await page.post(f"{layer}/reset")).raise_for_status()
    now, before = [
        (await page.post(f"{HERE}{query}", json={"input": BATCH.tolist()})).json() for query in ("", "?at=2")
    ]
    assert (now["version"], before["version"]) == (3, 2)
    assert now["after"]["mean"] != before["after"]["mean"]


@pytest.mark.parametrize(
    ("body", "form", "status", "name"),
    [
        (b'{"input": [[1, 2, 3]]}', "application/json", 422, "shape-mismatch"),
        (b'{"other": [[1, 2]]}', "application/json", 422, "invalid-request"),
        (b"[[1, 2]]", "application/json", 400, "malformed-body"),
        (npy(BATCH.astype("f8")), "application/x-npy", 422, "dtype-mismatch"),
        (npy(BATCH)[:-1], "application/x-npy", 400, "malformed-body"),
        (b"", "text/csv", 415, "unsupported-media-type"),
    ],
)
async def test_what_is_refused_is_what_eval_refuses(page, layer, body, form, status, name):
    here, there = [
        await page.post(path, content=body, headers={"Content-Type": form, "Accept": "*/*"})
        for path in (HERE, f"{layer}/eval")
    ]
    assert (here.status_code, here.json()["type"]) == (status, f"/problems/{name}")
    assert here.json()["detail"] == there.json()["detail"]


async def test_larger_batches_than_eval_takes_are_refused(serve):
    async with serve(max_elements=6) as service, service.client() as client:
        await client.put("/v1/layers/layer1.0.bn1", json={"num_features": 2})
        answer = await client.post(HERE, json={"input": BATCH.tolist()})
        assert (answer.status_code, answer.json()["type"]) == (413, "/problems/payload-too-large")


async def test_an_empty_batch(page, layer):
    document = (await page.post(HERE, json={"input": []})).json()
    assert (document["shape"], document["before"]["counts"], document["after"]["values"]) == ([0, 2], [], 0)


@pytest.mark.parametrize(
    "values",
    [[1e30, 1e30], [0.0, 0.0], [-5.0], [1.0, np.nextafter(np.float32(1), np.float32(2))], [3e38, -3e38], [1e-45, 0.0]],
)
def test_every_finite_value_is_counted(values):
    part = histogram(Tensor.of(np.array([values], np.float32)), 1, None)
    assert sum(part["counts"]) == len(values)
    assert len(part["counts"]) == BINS
    assert all(a < b for a, b in zip(part["edges"], part["edges"][1:], strict=False))


MOST = np.finfo(np.float64).max


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        ([MOST, -MOST], 0, MOST),
        ([MOST, MOST], MOST, 0),
        ([-MOST, -MOST, -MOST, -MOST], -MOST, 0),
        ([0, 2000 * 5e-324], 1000 * 5e-324, 1000 * 5e-324),
        ([0, 100 * 5e-324], 50 * 5e-324, 50 * 5e-324),
        ([1, 1 + 61 * 2.0**-52, 1, 1 + 61 * 2.0**-52], None, None),
    ],
)
def test_the_largest_and_smallest_numbers_of_float64(values, mean, std):
    """500, because the span was infinite, or its bins were no larger than a rounding."""
    part = histogram(Tensor.of(np.array([values], np.float64)), 1, None)
    assert (sum(part["counts"]), part["low"], part["high"]) == (len(values), min(values), max(values))
    assert np.isfinite(part["edges"]).all()
    assert all(a < b for a, b in zip(part["edges"], part["edges"][1:], strict=False))
    if mean is not None:
        assert (part["mean"], part["std"]) == (mean, std)


def test_a_large_batch_is_counted_in_blocks():
    """Of the finite values a copy was made, and another in float64: a batch of 64 MiB took 500 MB more."""
    random = np.random.default_rng(0)
    values = random.normal(3, 2, (1 << 20, 4)).astype(np.float32)
    values[::7, 1] = np.nan
    batch = Tensor.of(values)
    tracemalloc.start()
    try:
        part = histogram(batch, 1, None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes
    finite = values[np.isfinite(values)].astype(np.float64)
    assert part["counts"] == np.histogram(finite, BINS)[0].tolist()
    assert part["edges"] == pytest.approx(np.histogram_bin_edges(finite, BINS), rel=1e-14, abs=1e-14)
    assert (part["mean"], part["std"]) == pytest.approx((finite.mean(), finite.std()), rel=1e-12)
    assert part["not_finite"] == values.size - finite.size


def test_values_that_are_not_finite_are_counted_apart():
    batch = np.array([[np.nan, 1], [np.inf, 2], [-np.inf, 3]], np.float32)
    part = histogram(Tensor.of(batch), 1, None)
    assert (part["values"], part["not_finite"], sum(part["counts"]), part["mean"]) == (6, 3, 3, 2)
    assert histogram(Tensor.of(batch), 1, 0)["counts"] == []


def test_channels_last():
    batch = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    assert histogram(Tensor.of(batch), -1, 2)["mean"] == batch[..., 2].mean()
