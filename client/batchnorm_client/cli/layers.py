"""Commands on layers: layers, show, drift, create, reset, delete."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

from batchnorm_client.cli.output import (
    Json,
    console,
    layers_table,
    print_document,
    print_documents,
    print_drift,
    print_json,
    print_layer,
    say,
)
from batchnorm_client.cli.service import USAGE, At, Expect, IfMatch, Name, Service, calling, fail, size, with_service
from batchnorm_client.wire.statistics import KindName


@with_service
def layers(
    prefix: Annotated[str, typer.Option(help="Only layers whose names start with this.", show_default=False)] = "",
    *,
    service: Service,
    json: Json = False,
) -> None:
    """List the layers, by name."""
    with calling(service) as client:
        found = list(client.layers(prefix))
    if json:
        print_documents(found)
    elif found:
        console().print(layers_table(found, console().width))
    else:
        typer.echo(f"No layers{f' that start with {prefix}' if prefix else ' yet'}.")


@with_service
def show(
    name: Name,
    channels: Annotated[
        bool, typer.Option("--channels", help="A table of all channels instead of sparklines.", show_default=False)
    ] = False,
    at: At = None,
    expect: Expect = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Show a layer: config, counters, and its statistics as sparklines over the channels."""
    with calling(service) as client:
        layer = client.layer(name, at=at, expect=expect).inspect()
    if json:
        print_document(layer)
    else:
        print_layer(layer, channels, console())


@with_service
def drift(
    name: Name,
    channels: Annotated[
        bool, typer.Option("--channels", help="A table of all channels instead of sparklines.", show_default=False)
    ] = False,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Show how far the batches that come in are from what a layer knows, smoothed over the batches."""
    with calling(service) as client:
        found = client.layer(name).drift()
    if json:
        print_document(found)
    else:
        print_drift(name, found, channels, console())


@with_service
def create(
    name: Name,
    num_features: Annotated[int, typer.Option(metavar="C", help="The number of channels.", show_default=False)],
    eps: Annotated[float | None, typer.Option(metavar="NUMBER", help="Added to the variance; 1e-5 by default.")] = None,
    momentum: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="As in torch, 0.1 by default; [b]none[/b] for the cumulative average."),
    ] = None,
    no_affine: Annotated[bool, typer.Option("--no-affine", help="Without weight and bias.")] = False,
    no_track_running_stats: Annotated[
        bool, typer.Option("--no-track-running-stats", help="Without running statistics.")
    ] = False,
    statistics: Annotated[
        KindName | None,
        typer.Option(metavar="RULE", help="[b]moving[/b], torch's rule (default), or [b]population[/b]: exact."),
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option(metavar="1|2|3", help="Input ranks as in BatchNorm1d, 2d or 3d; any by default."),
    ] = None,
    channel_axis: Annotated[
        int | None, typer.Option(metavar="AXIS", help="The axis of the channels: 1 by default; -1 for channels last.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float64"] | None,
        typer.Option(metavar="DTYPE", help="Of the state: [b]float32[/b] (default) or [b]float64[/b]."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; by default the service's choice.")
    ] = None,
    non_finite: Annotated[
        Literal["reject", "allow"] | None,
        typer.Option(metavar="RULE", help="[b]reject[/b] (default) or [b]allow[/b] batches with NaN or infinity."),
    ] = None,
    half_life: Annotated[
        float | None, typer.Option(metavar="SAMPLES", help="Of population statistics; no decay by default.")
    ] = None,
    clip: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Clamp outputs to [-NUMBER, NUMBER]; no limit by default.")
    ] = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Create a layer; does nothing if it exists with this config."""
    given = {
        "eps": eps,
        "affine": False if no_affine else None,
        "track_running_stats": False if no_track_running_stats else None,
        "statistics": statistics,
        "dimensions": dimensions,
        "channel_axis": channel_axis,
        "dtype": dtype,
        "device": device,
        "non_finite": non_finite,
        "half_life": half_life,
        "clip": clip,
    }
    options: Any = {option: value for option, value in given.items() if value is not None}
    if momentum is not None:
        options["momentum"] = _momentum(momentum)
    with calling(service) as client:
        layer = client.create_layer(name, num_features, **options).inspect()
    if json:
        print_document(layer)
    else:
        say(name, size(layer))


@with_service
def reset(
    name: Name,
    what: Annotated[
        Literal["running_stats", "parameters", "all"],
        typer.Option(help="Running statistics, weight and bias, or both."),
    ] = "running_stats",
    if_match: IfMatch = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Reset a layer to its initial values."""
    with calling(service) as client:
        layer = client.layer(name).reset(what, if_match=if_match)
    if json:
        print_document(layer)
    else:
        done = {"running_stats": "running statistics", "parameters": "weight and bias", "all": "everything"}[what]
        say(name, f"{done} set back; {size(layer)}")


@with_service
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.", show_default=False)] = False,
    with_pins: Annotated[
        bool, typer.Option("--with-pins", help="Also if it has pins; deletes them, too.", show_default=False)
    ] = False,
    if_match: IfMatch = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Delete a layer, after asking."""
    with calling(service) as client:
        layer = client.layer(name)
        if not yes:
            if not can_ask():
                fail(f"no terminal to ask whether to delete {name}; --yes deletes it without asking", USAGE)
            typer.confirm(f"Delete {name} ({size(layer.inspect())})?", abort=True, err=True)
        layer.delete(if_match=if_match, with_pins=with_pins)
    if json:
        print_json({"name": name, "deleted": True})
    else:
        say(name, "deleted")


def can_ask() -> bool:
    """Whether there is a terminal that can be asked."""
    return sys.stdin.isatty()


def _momentum(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor none", param_hint="--momentum") from None
