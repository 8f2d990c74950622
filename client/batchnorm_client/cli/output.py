"""Output of commands: tables for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import orjson
import typer
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchnorm_client.wire.documents import Drift, HistoryEntry, Layer, LayerSummary, Pin

Vector = npt.NDArray[np.float64]

Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.", show_default=False)]

_LEVELS: Final = "▁▂▃▄▅▆▇█"
_PLAIN_LEVELS: Final = "_.-:=+*#"
_NARROW: Final = 60
"""In narrower terminals the range of a sparkline is on a line of its own."""

_LABEL: Final = 14
_RANGE: Final = 24


def console() -> Console:
    """A console for the present stdout, which tests and pipes replace."""
    return Console(highlight=False)


def print_json(value: Any) -> None:
    """One JSON document. What is not finite becomes a string, as in the contract."""
    typer.echo(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode())


def print_document(document: BaseModel) -> None:
    """A layer or a pin as JSON, as the service gives it."""
    typer.echo(document.model_dump_json())


def print_documents(documents: Iterable[BaseModel]) -> None:
    """Several as a JSON array."""
    print_json([document.model_dump(mode="json") for document in documents])


def say(name: str, text: str) -> None:
    """A line about a layer. A terminal may wrap it; in a pipe it is one line."""
    console().print(Text.assemble((name, "bold cyan"), f": {text}"), soft_wrap=True)


def layers_table(layers: Iterable[LayerSummary], width: int) -> Table:
    """One line for each layer; without version and time in a narrow terminal."""
    shown = 2 if width < _NARROW else 4
    table = _table("layer", *("channels", "batches", "version", "updated")[:shown])
    for layer in layers:
        counts = [f"{count:,}" for count in (layer.num_features, layer.num_batches_tracked, layer.version)]
        table.add_row(Text(layer.name), *[*counts, ago(layer.updated_at)][:shown])
    return table


def history_table(states: Iterable[HistoryEntry], pins: Iterable[Pin], width: int) -> Table:
    """One line for each state, with the tags of its pins; only version and time in a narrow terminal."""
    shown = 1 if width < _NARROW else 4
    table = _table("version", *("made", "batches", "samples", "made by")[:shown], "tags")
    tags: dict[int, list[str]] = {}
    for pin in pins:
        tags.setdefault(pin.version, []).append(pin.tag)
    for state in states:
        counts = (f"{state.num_batches_tracked:,}", f"{state.samples_tracked:,}")
        cells = (ago(state.at), *counts, state.operation)[:shown]
        table.add_row(f"{state.version:,}", *cells, Text(", ".join(tags.get(state.version, ()))))
    return table


def pins_table(pins: Iterable[Pin], width: int) -> Table:
    """One line for each pin; digests are folded in a narrow terminal."""
    shown = 1 if width < _NARROW else 2
    table = _table("tag", *("version", "pinned")[:shown], "digest")
    for pin in pins:
        table.add_row(Text(pin.tag), *(f"{pin.version:,}", ago(pin.at))[:shown], pin.digest)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(first, style="cyan", overflow="fold", min_width=8)
    for name in others:
        text = name in {"tags", "digest"}
        table.add_column(name, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    return table


def print_layer(layer: Layer, channels: bool, out: Console) -> None:
    """Everything about a layer; its vectors as sparklines, or channel by channel."""
    _print_facts(layer.name, _facts(layer), out)
    _print_vectors(_vectors(layer), channels, out)


def print_drift(name: str, drift: Drift, channels: bool, out: Console) -> None:
    """The drift of a layer; its channels as sparklines, or one by one."""
    _print_facts(name, _drift_facts(drift), out)
    vectors = {"mean, in sd": drift.channels.z, "ln var ratio": drift.channels.log_var_ratio}
    _print_vectors({label: np.asarray(values, np.float64) for label, values in vectors.items()}, channels, out)


def _drift_facts(drift: Drift) -> Iterable[tuple[str, str]]:
    if drift.since is None:
        state = "none"
    else:
        state = f"since {drift.since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC, {ago(drift.since)}"
    yield "drift", state
    yield "score", f"{drift.score:.3g}; drift begins at {drift.threshold:g}"
    yield "batches", f"{drift.batches:,} compared"
    if (worst := drift.worst) is not None:
        ratio = math.exp(worst.log_var_ratio / 2)
        yield "worst", f"channel {worst.channel:,}: mean shifted by {worst.z:.3g} sd, sd times {ratio:.3g}"


def _print_facts(name: str, found: Iterable[tuple[str, str]], out: Console) -> None:
    out.print(Text(name, "bold cyan"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True, min_width=_LABEL - 2)
    facts.add_column(overflow="fold")
    for label, value in found:
        facts.add_row(label, value)
    out.print(facts)


def _print_vectors(vectors: dict[str, Vector], channels: bool, out: Console) -> None:
    if not vectors:
        return
    out.print()
    if channels:
        out.print(_channel_table(vectors))
        return
    for label, values in vectors.items():
        out.print(_sparkline_row(label, values, out))


def _facts(layer: Layer) -> Iterable[tuple[str, str]]:
    config = layer.config
    ranks = config.input_ranks
    shape = "any rank from 2 on" if ranks is None else "rank " + " or ".join(map(str, ranks))
    yield "channels", f"{config.num_features:,} on axis {config.channel_axis}; {shape}"
    yield "state", config.dtype + (f" on {config.device}" if config.device else "")
    yield "batches", f"{layer.num_batches_tracked:,}"
    yield "samples", f"{layer.samples_tracked:,} per channel"
    yield "version", f"{layer.version:,}"
    yield "digest", layer.digest
    yield "statistics", _statistics(layer)
    yield "options", _options(layer)
    for label, moment in (("created", layer.created_at), ("updated", layer.updated_at)):
        yield label, f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC, {ago(moment)}"


def _statistics(layer: Layer) -> str:
    config = layer.config
    if config.statistics == "population":
        rule = "population: exact over all samples"
    elif config.momentum is None:
        rule = f"{config.statistics}, cumulative average"
    else:
        rule = f"{config.statistics}, momentum {config.momentum:g}"
    return rule if config.track_running_stats else f"{rule}; not tracked"


def _options(layer: Layer) -> str:
    config = layer.config.model_dump()
    options = [f"eps {config['eps']:g}", "affine" if config["affine"] else "not affine"]
    options.append(f"non-finite batches: {config['non_finite']}")
    options += [f"{name.replace('_', ' ')} {config[name]:g}" for name in ("half_life", "clip") if config.get(name)]
    return ", ".join(options)


def _vectors(layer: Layer) -> dict[str, Vector]:
    found = {}
    if layer.running_mean is not None and layer.running_var is not None:
        found["running mean"] = np.asarray(layer.running_mean, np.float64)
        with np.errstate(invalid="ignore"):
            found["running std"] = np.sqrt(np.asarray(layer.running_var, np.float64))
    for name, vector in (("weight", layer.weight), ("bias", layer.bias)):
        if vector is not None:
            found[name] = np.asarray(vector, np.float64)
    return found


def _channel_table(vectors: dict[str, Vector]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("channel", justify="right", style="dim")
    for label in vectors:
        table.add_column(label, justify="right")
    for channel, values in enumerate(zip(*vectors.values(), strict=True)):
        table.add_row(str(channel), *(f"{value:.6g}" for value in values))
    return table


def _sparkline_row(label: str, values: Vector, out: Console) -> Text:
    narrow = out.width < _NARROW
    width = max(8, out.width - _LABEL - (0 if narrow else _RANGE))
    levels = _LEVELS if out.encoding.lower().startswith("utf") else _PLAIN_LEVELS
    line = Text.assemble((f"{label:{_LABEL}}", "dim"), no_wrap=True)
    if len(values) > 1 and values.min() == values.max():
        return line.append(f"{values[0]:.4g} in every channel")
    line.append(sparkline(values, width, levels), "green")
    return line.append(f"\n{'':{_LABEL}}" if narrow else "  ").append(_span(values))


def sparkline(values: Vector, width: int, levels: str = _LEVELS) -> str:
    """Values as a line of at most `width` bars; if there are more values, each bar is the mean of neighbours.

    The smallest value has the lowest bar, the largest the highest; if all are equal, bars have half the height. NaN and
    infinity are shown as x.
    """
    array = values
    if len(array) > width:
        array = np.array([part.mean() for part in np.array_split(array, width)])
    finite = array[np.isfinite(array)]
    if not finite.size:
        return "x" * len(array)
    low, high = float(finite.min()), float(finite.max())
    if low == high:
        heights = np.full(len(array), len(levels) // 2 - 1, np.float64)
    else:
        # Halved first: the difference of two large numbers may overflow.
        heights = (array / 2 - low / 2) / (high / 2 - low / 2) * (len(levels) - 1)
    return "".join(
        levels[round(float(height))] if math.isfinite(value) else "x"
        for value, height in zip(array, heights, strict=True)
    )


def _span(values: Vector) -> str:
    finite = values[np.isfinite(values)]
    strange = len(values) - len(finite)
    text = ""
    if finite.size:
        low, high = f"{finite.min():.4g}", f"{finite.max():.4g}"
        text = low if low == high else f"{low} to {high}"
    if strange:
        text += f"{', ' if text else ''}{strange:,} not finite"
    return text


def ago(moment: datetime) -> str:
    """How long ago something was, in one unit."""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length):,} {unit} ago"
    return f"{int(seconds)} s ago"
