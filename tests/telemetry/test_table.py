"""The table of metrics, and that the docs have each of them."""

import ast
import re
from pathlib import Path

import pytest

from batchnorm_client.wire.errors import PROBLEMS
from batchnorm_service.app import INTERFACES, ROUTES
from batchnorm_service.rest.application import all_routers
from batchnorm_service.store.base import Store
from batchnorm_service.telemetry import metrics as table
from batchnorm_service.telemetry.metrics import LABELS, METRICS, OUTCOMES

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(batchnorm_\w+)` \| (\w+) \|(.*?)\| (.+?) \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs/metrics.md").read_text())


def test_the_docs_have_every_metric():
    documented = [(name, kind, tuple(re.findall(r"\w+", labels))) for name, kind, labels, _ in ROWS]
    assert sorted(documented) == sorted((each.name, each.kind, each.labels) for each in METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_are_as_prometheus_recommends(metric):
    assert re.fullmatch(r"batchnorm(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.endswith("_info") == (metric.kind == "info")
    assert metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.kind != "gauge" or not metric.labels


def test_names_are_unique():
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_every_metric_is_reported():
    """By its name in the table; one that follows from another is not."""
    names = {name for name, value in vars(table).items() if isinstance(value, table.Metric)}
    assert len(names) == len(METRICS)
    used = set()
    for path in (ROOT / "service").rglob("*.py"):
        if path.name != "metrics.py" or path.parent.name != "telemetry":
            used |= {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert names - used == {"REQUESTS", "BUILD_INFO"}


def test_labels_have_fixed_values():
    at_start = {"route", "version", "python", "torch"}
    assert {label for metric in METRICS for label in metric.labels} == LABELS.keys() | at_start
    assert set(PROBLEMS) < set(OUTCOMES)
    assert all(hasattr(Store, operation) for operation in LABELS["operation"])


def test_every_route_is_a_label():
    paths = {route.path for router in all_routers(INTERFACES) for route in router.routes}
    assert set(ROUTES.templates()) == paths | {"other"}
    for path in paths:
        assert ROUTES.template_of(re.sub(r"\{\w+\}", "x", path)) == path
    for path in ("/nowhere", "/v1/layers/x/y/z", "/v2/models/x/y/z", ""):
        assert ROUTES.template_of(path) == "other"
