"""The dashboard and the alert rules, read by a parser of PromQL: they ask for what there is."""

import json
import re
from pathlib import Path

import promql_parser
import pytest
import yaml

from batchnorm_service.app import ROUTES
from batchnorm_service.telemetry.metrics import LABELS, METRICS

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus-alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum")}
SERIES = {metric.name + suffix: metric for metric in METRICS for suffix in SUFFIXES.get(metric.kind, ("",))}
BY_PROMETHEUS = {"instance", "job"}  # labels that a scrape adds
VALUES = LABELS | {"route": tuple(ROUTES.templates())}


def expressions():
    alerts = [(rule["alert"], rule["expr"]) for rule in RULES]
    return alerts + [(title, plain(target)) for title, target in TARGETS]


def plain(target):
    """The expression of a panel, with what Grafana puts in place of its variables."""
    return target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")


def nodes(expression):
    found = []
    promql_parser.walk(promql_parser.parse(expression), found.append)
    return found


def labels_of(name):
    if name == "up":  # Prometheus's own
        return set(BY_PROMETHEUS)
    return {*SERIES[name].labels, *BY_PROMETHEUS, *(["le"] if name.endswith("_bucket") else [])}


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_expressions_ask_for_metrics_and_labels_that_exist(where, expression):
    found = nodes(expression)
    selectors = [node for node in found if isinstance(node, promql_parser.VectorSelector)]
    assert selectors
    for selector in selectors:
        available = labels_of(selector.name)
        for matcher in selector.matchers.matchers:
            assert matcher.name in available, matcher
            if matcher.op == promql_parser.MatchOp.Equal and matcher.name not in BY_PROMETHEUS:
                assert matcher.value in VALUES[matcher.name], matcher
    for node in found:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            inside = [each for each in nodes(node.expr.prettify()) if isinstance(each, promql_parser.VectorSelector)]
            assert all(set(node.modifier.labels) <= labels_of(each.name) for each in inside), where


def test_a_rate_is_taken_of_what_only_grows():
    for where, expression in expressions():
        for node in nodes(expression):
            if isinstance(node, promql_parser.Call) and node.func.name in {"rate", "increase"}:
                (argument,) = node.args
                assert SERIES[argument.vector_selector.name].kind in {"counter", "histogram"}, where


def test_what_is_no_metric_is_found():
    with pytest.raises(KeyError):
        test_expressions_ask_for_metrics_and_labels_that_exist("", "batchnorm_folds")
    with pytest.raises(AssertionError):
        test_expressions_ask_for_metrics_and_labels_that_exist("", "sum by (layer) (batchnorm_folds_total)")
    with pytest.raises(AssertionError):
        test_expressions_ask_for_metrics_and_labels_that_exist("", 'batchnorm_requests_total{outcome="bad"}')


def test_every_alert_is_complete_and_in_the_docs():
    section = (ROOT / "docs/operations.md").read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\*\*(\w+)\*\*", section, re.MULTILINE) == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert promql_parser.parse_duration(rule.get("for", "1m"))
        named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert "instance" in named
        assert all(named <= set(node.modifier.labels) for node in nodes(rule["expr"]) if aggregates(node))


def aggregates(node):
    return isinstance(node, promql_parser.AggregateExpr)


def test_the_dashboard_is_one():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    for title, target in TARGETS:
        assert target["datasource"]["uid"] == "${datasource}"
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        aggregated = [node for node in nodes(plain(target)) if aggregates(node)]
        assert all(named <= set(node.modifier.labels if node.modifier else ()) for node in aggregated[:1]), title
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance"}


def test_every_metric_is_on_the_dashboard():
    shown = {
        SERIES[node.name].name
        for _, target in TARGETS
        for node in nodes(plain(target))
        if isinstance(node, promql_parser.VectorSelector)
    }
    assert shown == {metric.name for metric in METRICS}
