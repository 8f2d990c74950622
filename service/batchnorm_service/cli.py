"""The command `batchnorm-service`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from batchnorm_client.errors import DeviceUnavailable
from batchnorm_service import __version__
from batchnorm_service.server import PortUnavailableError, run
from batchnorm_service.settings import PREFIX, Settings, export, unknown_variables
from batchnorm_service.store.base import StoreRefusedError
from batchnorm_service.workers import WorkersFailedError, run_workers

log = logging.getLogger(__name__)

app = typer.Typer(
    name="batchnorm-service",
    help="Named batch-normalization layers over REST.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on; 0 for any that is free.")] = None,
    store: Annotated[
        str | None, typer.Option(help="Where layers are kept: memory:, sqlite:////file.db or valkey://host:port/0.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where layers live by default: cpu, cuda or cuda:N.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that share the port and the store.")] = None,
) -> None:
    """Run the service. Flags go before BATCHNORM_* environment variables; docs/settings.md lists those."""
    flags = {
        "host": host,
        "port": port,
        "store": store,
        "device": device,
        "log_level": log_level,
        "workers": workers,
    }
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        _fail("; ".join(_refused(details["loc"], details["msg"], given) for details in error.errors()), code=2)
    try:
        if settings.workers == 1:
            run(settings, _announce)
        else:
            export(given)
            run_workers(settings, _announce)
    except (StoreRefusedError, PortUnavailableError, DeviceUnavailable, WorkersFailedError) as error:
        _fail(str(error), code=1)


def _announce(url: str, settings: Settings, store: str) -> None:
    unknown = unknown_variables()
    if unknown:
        log.warning("no setting reads these environment variables: %s", ", ".join(unknown))
    token = "" if settings.token is None else f" -H 'Authorization: Bearer '\"${PREFIX}TOKEN\""
    json = " -H 'Content-Type: application/json'"
    typer.echo(f"""batchnorm-service {__version__}
  address  {url}
  store    {store}
  docs     {url}/docs
Try it:
  curl -X PUT {url}/v1/layers/demo{token}{json} -d '{{"num_features": 2}}'
  curl {url}/v1/layers/demo/train{token}{json} -d '{{"input": [[1, 2], [3, 4], [5, 9]]}}'""")
    sys.stdout.flush()


def _refused(location: tuple[int | str, ...], message: str, given: dict[str, Any]) -> str:
    name = str(location[0]) if location else ""
    message = message.removeprefix("Value error, ")
    if not name:
        return message
    return f"{'--' + name.replace('_', '-') if name in given else PREFIX + name.upper()}: {message}"


def _fail(message: str, *, code: int) -> None:
    typer.echo(f"batchnorm-service: {message}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line."""
    app()
