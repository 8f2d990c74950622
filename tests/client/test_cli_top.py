"""The command `top`, and `client.figures()`."""

import io
import json
import os
import pty
import re
import signal
import subprocess

import numpy as np
import pytest
from rich.console import Console

from batchnorm_client import Client
from batchnorm_client.cli.top import Screen, seconds
from batchnorm_client.wire.errors import ConnectionFailed, NotFound
from batchnorm_client.wire.figures import Figures, Times
from client.harness import environment, serving
from client.test_cli import PROGRAM

BATCH = np.array([[1, 2, 3], [4, 5, 7]], np.float32)


def test_figures(client, other, name):
    """Other tests use the service, too, but not from here."""
    layer = other.create_layer(name, 3)
    before = client.figures()
    for _ in range(3):
        layer.train(BATCH)
    after = client.figures()
    changed = after.since(before)
    assert changed.counters["folds_total"] == 3
    assert {row.name: row.calls for row in changed.routes}["POST /v1/layers/{name}/train"] == 3
    assert after.gauges["workers"] == 1


def test_in_a_pipe_it_ends(run, other, name):
    other.create_layer(name, 3).train(BATCH)
    shown = run("top", "--interval", 0.1).stdout
    assert re.search(r"POST /v1/layers/\{name\}/train +[1-9]", shown)
    assert re.search(r"requests/s +[\d.]+", shown)
    assert "\N{ESCAPE}" not in shown


def test_json(run):
    first, second = [
        json.loads(line) for line in run("top", "--json", "--count", 2, "--interval", 0.1).stdout.splitlines()
    ]
    assert first["counters"]["requests_total"] < second["counters"]["requests_total"]
    assert {"gauges", "counters", "routes", "store"} == first.keys()


@pytest.mark.parametrize("arguments", [["--interval", 0], ["--count", 0]])
def test_wrong_arguments(run, arguments):
    run("top", *arguments, code=2)


def test_metrics_that_are_off(run, monkeypatch):
    with serving(metrics=0) as url:
        monkeypatch.setenv("BATCHNORM_URL", url)
        assert "BATCHNORM_METRICS" in run("top", code=4).stderr
        with Client(url) as client, pytest.raises(NotFound):
            client.figures()


def test_in_a_terminal_it_runs_until_it_is_interrupted(url):
    """On a screen of its own; what was there before is there again."""
    terminal, inner = pty.openpty()
    command = [*PROGRAM, "top", "--interval", "0.1"]
    child = subprocess.Popen(command, env=environment(BATCHNORM_URL=url, TERM="xterm"), stdout=inner, stderr=inner)
    os.close(inner)
    seen = b""
    while seen.count(b"batchnorm top") < 3:
        seen += os.read(terminal, 65536)
    child.send_signal(signal.SIGINT)
    try:
        while data := os.read(terminal, 65536):
            seen += data
    except OSError:  # the other end is closed
        pass
    assert child.wait(timeout=30) == 0
    os.close(terminal)
    assert seen.index(b"\x1b[?1049h") < seen.rindex(b"\x1b[?1049l")
    assert b"requests/s" in seen


class Readings:
    """A client that returns these figures, or raises these errors, one after the other."""

    def __init__(self, *readings):
        self.readings = list(readings)

    def figures(self):
        reading = self.readings.pop(0)
        if isinstance(reading, Exception):
            raise reading
        return reading


def reading(requests, name="GET /v1/layers"):
    row = Times(name, counts=[requests, 0], bounds=[0.01])
    counters = dict.fromkeys(("folds_total", "commits_total", "conflicts_total"), 0.0) | {"requests_total": requests}
    gauges = ("running_calls", "queued_updates", "waiting_calls", "buffered_bytes", "resident_layers", "workers")
    return Figures(dict.fromkeys(gauges, 1.0), counters, [row], [])


def text_of(screen, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(screen.render(width))
    return console.export_text()


def test_a_service_that_is_away_for_a_while():
    screen, client = Screen("http://x"), Readings(reading(5.0), ConnectionFailed("refused"), reading(9.0))
    screen.read(client, patient=True)
    screen.read(client, patient=True)
    assert "not up to date: refused" in text_of(screen)
    assert re.search(r"GET /v1/layers +5", text_of(screen))
    screen.read(client, patient=True)
    assert "not up to date" not in text_of(screen)
    assert re.search(r"GET /v1/layers +9", text_of(screen))


def test_a_service_that_was_never_there():
    with pytest.raises(ConnectionFailed):
        Screen("http://x").read(Readings(ConnectionFailed("refused")), patient=True)


def test_a_service_that_was_restarted():
    """The counters begin again: a difference would be negative."""
    screen, client = Screen("http://x"), Readings(reading(50.0), reading(3.0))
    screen.read(client)
    screen.read(client)
    assert re.search(r"requests/s +\N{EN DASH}", text_of(screen))
    assert "-" not in text_of(screen)


def test_a_service_that_was_restarted_with_other_buckets():
    """ValueError: a release may have more buckets than the one before."""
    more = reading(60.0)
    more.routes[0].counts, more.routes[0].bounds = [50.0, 10.0, 0.0], [0.01, 0.1]
    screen, client = Screen("http://x"), Readings(reading(50.0), more)
    screen.read(client)
    screen.read(client)
    assert re.search(r"GET /v1/layers +60", text_of(screen))


def test_a_narrow_terminal_has_fewer_columns():
    screen = Screen("http://x")
    screen.read(Readings(reading(5.0)))
    assert "p99" in text_of(screen, 100)
    narrow = text_of(screen, 60)
    assert "p99" not in narrow
    assert all(len(line) <= 60 for line in narrow.splitlines())


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "\N{EN DASH}"), (5e-5, "50 µs"), (0.0125, "12.5 ms"), (0.9999, "1 s"), (2.5, "2.5 s")],
)
def test_times(value, text):
    assert seconds(value) == text
