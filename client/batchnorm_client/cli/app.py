"""The command `batchnorm`: all its subcommands."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from batchnorm_client.cli import files, history, layers, streams, top
from batchnorm_client.cli.service import EXIT_CODES

app = typer.Typer(
    name="batchnorm",
    help="Named batch-normalization layers of a service: list, inspect, train, evaluate, watch.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(version("batchnorm-service"))
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("layers")(layers.layers)
app.command("show")(layers.show)
app.command("drift")(layers.drift)
app.command("create")(layers.create)
app.command("reset")(layers.reset)
app.command("delete")(layers.delete)
app.command("history")(history.history)
app.command("rollback")(history.rollback)
app.command("pin")(history.pin)
app.command("pins")(history.pins)
app.command("unpin")(history.unpin)
app.command("export")(files.export)
app.command("import")(files.import_)
app.command("train")(streams.train)
app.command("eval")(streams.evaluate)
app.command("top")(top.top)
