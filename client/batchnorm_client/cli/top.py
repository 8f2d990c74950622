"""The command `top`: the service's figures, live."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Final

import numpy as np
import typer
from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from batchnorm_client.cli.output import Json, console, print_json, sparkline
from batchnorm_client.cli.service import Service, calling, with_service
from batchnorm_client.client import Client
from batchnorm_client.wire.errors import NoAnswer
from batchnorm_client.wire.figures import Figures, Times, together

_KEPT: Final = 60
_ROUTES: Final = 12
_NARROW: Final = 70


@with_service
def top(
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between two readings.")] = 2.0,
    count: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="End after so many readings; by default with Ctrl-C, in a pipe after 2."),
    ] = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Show the service's figures live: rates, times, queue, store. The page /ui/operations shows the same."""
    live = sys.stdout.isatty() and not json
    readings = count or (None if live else 1 if json else 2)
    with calling(service) as client:
        try:
            _run(client, interval, readings, live=live, json=json)
        except KeyboardInterrupt:
            if not live:
                raise


def _run(client: Client, interval: float, readings: int | None, *, live: bool, json: bool) -> None:
    screen = Screen(client.base_url)
    if json:
        for number in range(readings or 1):
            if number:
                time.sleep(interval)
            print_json(asdict(client.figures()))
        return
    if not live:
        for number in range(readings or 1):
            if number:
                time.sleep(interval)
            screen.read(client)
        console().print(screen.render(console().width))
        return
    with Live(console=console(), screen=True, auto_refresh=False) as view:
        number = 0
        while readings is None or number < readings:
            if number:
                time.sleep(interval)
            screen.read(client, patient=True)
            view.update(screen.render(view.console.width), refresh=True)
            number += 1


class Screen:
    """What is shown, from the readings so far.

    Args:
        url: of the service.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._figures: Figures | None = None
        self._changed: Figures | None = None
        self._seconds = 0.0
        self._at = 0.0
        self._late = ""
        self._rates: deque[float] = deque(maxlen=_KEPT)

    def read(self, client: Client, *, patient: bool = False) -> None:
        """Take a reading. If the service does not respond, and `patient`, the last one stays."""
        try:
            figures = client.figures()
        except NoAnswer as error:
            if not patient or self._figures is None:
                raise
            self._late = str(error)
            return
        at, self._late = time.monotonic(), ""
        changed = None if self._figures is None else figures.since(self._figures)
        # After a restart, or from another replica, a difference says nothing.
        self._changed = None if changed is None or changed.restarted else changed
        self._figures, self._seconds, self._at = figures, at - self._at, at
        if self._changed is not None:
            self._rates.append(self._changed.counters["requests_total"] / self._seconds)

    def render(self, width: int) -> RenderableType:
        """The screen, for a terminal of this width."""
        figures, changed = self._figures, self._changed
        assert figures is not None  # noqa: S101 - there was a reading
        title = Text.assemble(("batchnorm top", "bold"), "  ", (self._url, "dim"))
        if self._late:
            title.append(f"  not up to date: {self._late}", "red")
        parts: list[RenderableType] = [title, Text()]
        parts += [self._summary(figures, changed), Text()]
        if len(self._rates) > 1:
            line = sparkline(np.array(self._rates), min(width - 12, _KEPT))
            parts += [Text.assemble(("requests  ", "dim"), (line, "cyan")), Text()]
        parts.append(self._table("route", figures.routes, None if changed is None else changed.routes, width))
        parts.append(self._table("store", figures.store, None if changed is None else changed.store, width))
        return Group(*parts)

    def _summary(self, figures: Figures, changed: Figures | None) -> Table:
        counters = None if changed is None else changed.counters
        calls = together("all", (changed or figures).routes)
        grid = Table.grid(padding=(0, 3))
        for _ in range(4):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(justify="right", no_wrap=True)
        cells = [
            ("requests/s", _rate(counters, "requests_total", self._seconds)),
            ("folds/s", _rate(counters, "folds_total", self._seconds)),
            ("p95", seconds(calls.quantile(0.95))),
            ("failed", f"{calls.failed:,.0f}"),
            ("running", _gauge(figures, "running_calls")),
            ("queued", _gauge(figures, "queued_updates")),
            ("waiting", _gauge(figures, "waiting_calls")),
            ("buffered", f"{_gauge(figures, 'buffered_bytes')} B"),
            ("commits/s", _rate(counters, "commits_total", self._seconds)),
            ("conflicts/s", _rate(counters, "conflicts_total", self._seconds)),
            ("cached layers", _gauge(figures, "resident_layers")),
            ("workers", _gauge(figures, "workers")),
        ]
        for first in range(0, len(cells), 4):
            grid.add_row(*(part for cell in cells[first : first + 4] for part in cell))
        return grid

    def _table(self, label: str, rows: Iterable[Times], changed: Iterable[Times] | None, width: int) -> Table:
        """The rows with the most calls since the last reading; of the first reading, since the service started."""
        shown = 3 if width < _NARROW else 6
        columns = ("calls", "calls/s", "p50", "p95", "p99", "failed")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.add_column(label, style="cyan", overflow="ellipsis", no_wrap=True, min_width=12)
        for name in columns[:shown]:
            table.add_column(name, justify="right", no_wrap=True)
        whole = {times.name: times for times in rows}
        busiest = sorted(changed or whole.values(), key=lambda each: (-each.calls, -whole[each.name].calls))
        for times in busiest[:_ROUTES]:
            rate = "–" if changed is None else f"{times.calls / self._seconds:,.1f}"  # noqa: RUF001
            quantiles = [seconds(times.quantile(q)) for q in (0.5, 0.95, 0.99)]
            cells = (f"{whole[times.name].calls:,.0f}", rate, *quantiles, f"{times.failed:,.0f}")
            table.add_row(Text(times.name), *cells[:shown])
        return table


def seconds(value: float | None) -> str:
    """A time in a unit that fits."""
    if value is None:
        return "–"  # noqa: RUF001
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def _rate(counters: dict[str, float] | None, name: str, elapsed: float) -> str:
    return "–" if counters is None else f"{counters[name] / elapsed:,.1f}"  # noqa: RUF001


def _gauge(figures: Figures, name: str) -> str:
    return f"{figures.gauges[name]:,.0f}"
