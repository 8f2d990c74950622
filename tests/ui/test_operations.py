"""The operations page, and the figures that it and `batchnorm top` read from /metrics."""

import pytest

from batchnorm_client.wire.figures import COUNTERS, GAUGES, Times, read_figures, together
from batchnorm_service.telemetry.metrics import METRICS

from .conftest import text_of

pytestmark = pytest.mark.anyio


async def test_the_figures_are_those_of_what_was_done(page, layer):
    """The layer was created and trained once; then an eval that is refused, and one that is not."""
    for rows, status in (([[1, 2]], 200), ([[1, 2, 3]], 422)):
        assert (await page.post(f"{layer}/eval", json={"input": rows})).status_code == status
    figures = (await page.get("/ui/operations/figures")).json()
    routes = {row["name"]: row for row in figures["routes"]}
    row = routes["POST /v1/layers/{name}/eval"]
    assert (sum(row["counts"]), row["refused"], row["failed"]) == (2, 1, 0)
    assert len(row["counts"]) == len(row["bounds"]) + 1
    assert figures["counters"]["folds_total"] == figures["counters"]["commits_total"] == 1
    assert figures["gauges"]["workers"] == 1
    store = {row["name"]: sum(row["counts"]) for row in figures["store"]}
    assert (store["create"], store["commit"]) == (1, 1)
    assert figures["host"]
    text = text_of(await page.get("/ui/operations"))
    assert "POST /v1/layers/{name}/eval 2" in text


async def test_metrics_that_are_off(serve):
    async with serve(metrics=False) as service, service.client(Accept="text/html") as page:
        assert "Metrics are off" in text_of(await page.get("/ui/operations"))
        assert (await page.get("/ui/operations/figures", headers={"Accept": "*/*"})).status_code == 404


def test_every_figure_is_a_metric():
    """A metric that is renamed would be shown as 0."""
    names = {metric.name.removeprefix("batchnorm_"): metric.kind for metric in METRICS}
    assert {names[name] for name in GAUGES} == {"gauge"}
    assert {names[name] for name in COUNTERS} == {"counter"}
    assert {names["request_seconds"], names["store_seconds"]} == {"histogram"}


TEXT = r"""# HELP batchnorm_request_seconds Time.
# TYPE batchnorm_request_seconds histogram
batchnorm_request_seconds_bucket{le="0.001",method="POST",outcome="2xx",route="/v1/layers/{name}/eval"} 6.0
batchnorm_request_seconds_bucket{le="0.01",method="POST",outcome="2xx",route="/v1/layers/{name}/eval"} 9.0
batchnorm_request_seconds_bucket{le="+Inf",method="POST",outcome="2xx",route="/v1/layers/{name}/eval"} 10.0
batchnorm_request_seconds_count{method="POST",outcome="2xx",route="/v1/layers/{name}/eval"} 10.0
batchnorm_request_seconds_sum{method="POST",outcome="2xx",route="/v1/layers/{name}/eval"} 2.5
batchnorm_request_seconds_bucket{le="0.001",method="POST",outcome="overloaded",route="/v1/layers/{name}/eval"} 2.0
batchnorm_request_seconds_bucket{le="0.01",method="POST",outcome="overloaded",route="/v1/layers/{name}/eval"} 2.0
batchnorm_request_seconds_bucket{le="+Inf",method="POST",outcome="overloaded",route="/v1/layers/{name}/eval"} 2.0
batchnorm_request_seconds_count{method="POST",outcome="overloaded",route="/v1/layers/{name}/eval"} 2.0
batchnorm_request_seconds_sum{method="POST",outcome="overloaded",route="/v1/layers/{name}/eval"} 0.5
batchnorm_request_seconds_created{method="POST",outcome="2xx",route="x"} 1.7e+09
batchnorm_folds_total 7.0
batchnorm_commits_total{update="folds"} 3.0
batchnorm_commits_total{update="change"} 1.0
batchnorm_running_calls 5.0
batchnorm_build_info{version="a \"quoted\" b"} 1.0
other_metric 3.0
not a line
"""


def test_reading_the_text():
    figures = read_figures(TEXT)
    (row,) = figures.routes[:1]
    assert row.name == "POST /v1/layers/{name}/eval"
    assert (row.counts, row.bounds) == ([8, 3, 1], [0.001, 0.01])
    assert (row.calls, row.failed, row.refused, row.seconds) == (12, 2, 0, 3)
    assert (figures.counters["folds_total"], figures.counters["commits_total"]) == (7, 4)
    assert (figures.gauges["running_calls"], figures.gauges["workers"]) == (5, 0)


def test_quantiles_are_prometheus_s():
    """histogram_quantile: linear within a bucket that starts at the bound below, the last bound above all."""
    times = Times("x", counts=[8, 3, 1], bounds=[0.001, 0.01])
    assert times.quantile(0.5) == pytest.approx(0.001 * 6 / 8)
    assert times.quantile(0.75) == pytest.approx(0.001 + 0.009 * 1 / 3)
    assert times.quantile(0.999) == 0.01
    assert Times("x", counts=[0, 0], bounds=[1]).quantile(0.5) is None


def test_what_happened_in_between():
    before, now = (
        read_figures(TEXT),
        read_figures(TEXT.replace(" 10.0", " 14.0").replace("folds_total 7", "folds_total 9")),
    )
    changed = now.since(before)
    assert changed.routes[0].counts == [0, 0, 4]
    assert changed.counters["folds_total"] == 2
    assert not changed.restarted
    assert before.since(now).restarted
    assert together("all", changed.routes).calls == 4
