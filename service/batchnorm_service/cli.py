"""The command `batchnorm-service`."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from batchnorm_client.wire.errors import DeviceUnavailable
from batchnorm_service import __version__
from batchnorm_service.backup import backup, restore
from batchnorm_service.open_files import allow_open_files
from batchnorm_service.settings import PREFIX, Settings, export, unknown_variables
from batchnorm_service.store.base import Store, StoreDamagedError, StoreError, StoreRefusedError
from batchnorm_service.store.registry import store_from_url
from batchnorm_service.telemetry.traces import TracesRefusedError
from batchnorm_service.tokens import Scope, TokenFileError, add_token, describe_user, load_tokens, revoke_token
from batchnorm_service.tokens.stored import is_prefix
from batchnorm_service.transfer import ProgressCallback, Report, SameStoreError, migrate, store_to_move

log = logging.getLogger(__name__)

app = typer.Typer(
    name="batchnorm-service",
    help="Named batch-normalization layers over REST.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


tokens = typer.Typer(help="Make, list and revoke tokens for callers.", no_args_is_help=True)
app.add_typer(tokens, name="token")

ScopeName = Literal["read", "train", "admin"]
TokensFile = Annotated[
    Path | None,
    typer.Option("--file", envvar=f"{PREFIX}TOKENS_FILE", show_envvar=True, help="The token file.", show_default=False),
]


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
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines without tokens: anybody may change every layer.")
    ] = False,
) -> None:
    """Run the service. Flags override BATCHNORM_* environment variables; docs/settings.md lists those."""
    options = {
        "host": host,
        "port": port,
        "store": store,
        "device": device,
        "log_level": log_level,
        "workers": workers,
        "insecure": insecure or None,
    }
    flags: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    try:
        settings = Settings(**flags)
    except ValidationError as error:
        _fail("; ".join(_describe_error(details["loc"], details["msg"], flags) for details in error.errors()), code=2)
    if not (settings.has_tokens or settings.insecure or _is_local(settings.host)):
        _fail(
            f"other machines can reach {settings.host or 'every address'}, and there are no tokens: set"
            f" {PREFIX}TOKENS_FILE or {PREFIX}TOKEN; --insecure ({PREFIX}INSECURE=1) serves without",
            code=2,
        )
    try:
        store_from_url(settings.store, settings.store_options())
    except StoreRefusedError as error:
        _fail(_describe_error(("store",), str(error), flags), code=2)
    # Imported late, because importing torch takes seconds: version, help and invalid flags need not wait for it.
    from batchnorm_service.server import CertificateError, PortUnavailableError, run  # noqa: PLC0415
    from batchnorm_service.workers import WorkersFailedError, run_workers  # noqa: PLC0415

    allow_open_files()  # workers inherit it
    try:
        if settings.workers == 1:
            run(settings, _announce)
        else:
            export(flags)
            run_workers(settings, _announce)
    except StoreDamagedError as error:
        _fail(f"{error}; restore a backup: batchnorm-service restore FILE --overwrite", code=2)
    except (TokenFileError, CertificateError, TracesRefusedError) as error:
        _fail(str(error), code=2)
    except (StoreRefusedError, PortUnavailableError, DeviceUnavailable, WorkersFailedError) as error:
        _fail(str(error), code=1)


@tokens.command("create")
def _create_token(
    scope: Annotated[ScopeName, typer.Option(help="What it allows: read, train or admin; each includes the former.")],
    prefix: Annotated[
        str | None, typer.Option(help="Only layers whose names start with this, such as team1.", show_default="all")
    ] = None,
    file: TokensFile = None,
) -> None:
    """Make a token and print it as the last word: only its salted hash is kept. A running service reads it at once."""
    # An empty one is refused too: it comes from a variable that is not set, and would mean all layers.
    if prefix is not None and not is_prefix(prefix):
        _fail(f"--prefix: no layer's name can start with {prefix!r}", code=2)
    with _token_file(file) as path:
        new = not path.exists()
        token, stored = add_token(path, Scope.parse(scope), prefix or "")
    if new:
        owner = describe_user(path.stat().st_uid)
        typer.echo(f"batchnorm-service: {path} is new; only {owner} can read it, so run the service as it", err=True)
    typer.echo(f"{stored.id}: scope {scope}, {_layers_of(stored.grant.prefix)}: {token}")


@tokens.command("list")
def _list_tokens(file: TokensFile = None) -> None:
    """List the tokens by id, scope, layers and time of creation; the tokens themselves are not known."""
    with _token_file(file) as path:
        for token in load_tokens(path).values():
            grant = token.grant
            typer.echo(f"{token.id}  {grant.scope!s:5}  {token.created:%Y-%m-%d %H:%M} UTC  {_layers_of(grant.prefix)}")


@tokens.command("revoke")
def _revoke_token(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As `token list` shows it.")], file: TokensFile = None
) -> None:
    """Revoke a token. A running service refuses it within two seconds."""
    with _token_file(file) as path:
        if not revoke_token(path, token_id):
            _fail(f"{path} has no token with the id {token_id!r}", code=1)
    typer.echo(f"{token_id}: revoked")


@contextmanager
def _token_file(file: Path | None) -> Iterator[Path]:
    """The file of a token command; reports what is wrong with it."""
    if file is None:
        _fail(f"no token file: set {PREFIX}TOKENS_FILE, or give --file", code=2)
    try:
        yield file
    except TokenFileError as error:
        _fail(str(error), code=2)


def _layers_of(prefix: str) -> str:
    return f"layers {prefix}*" if prefix else "all layers"


@app.command("migrate")
def _migrate(
    source: Annotated[str, typer.Option("--from", help="The store to copy from.", envvar=f"{PREFIX}MIGRATE_FROM")],
    target: Annotated[str, typer.Option("--to", help="The store to copy to.", envvar=f"{PREFIX}MIGRATE_TO")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace layers that differ in the target.")] = False,
) -> None:
    """Copy all layers, their history and unexpired receipts to another store, and verify them. Stop all services first.

    Repeat it after an interruption. Exit status: 0 if the copy is complete, 1 if it is not, 2 for invalid options.
    Give URLs with passwords as BATCHNORM_MIGRATE_FROM and BATCHNORM_MIGRATE_TO instead of flags.
    """
    try:
        settings = Settings()
        stores = store_to_move(source, settings, target=False), store_to_move(target, settings, target=True)
    except ValidationError as error:
        _fail("; ".join(_describe_error(details["loc"], details["msg"], {}) for details in error.errors()), code=2)
    except StoreRefusedError as error:
        _fail(str(error), code=2)
    try:
        with _progress_bar() as progress:
            report = asyncio.run(migrate(*stores, progress, overwrite=overwrite))
    except SameStoreError as error:
        _fail(str(error), code=2)
    except StoreRefusedError as error:
        _fail(str(error), code=1)
    except StoreError as error:
        _fail(f"{error}; what was copied is there, and the same command goes on", code=1)
    except KeyboardInterrupt:
        _fail("stopped; what was copied is there, and the same command goes on", code=130)
    typer.echo(f"{stores[0].url} -> {stores[1].url}: {_summary(report)}")
    if not report.complete:
        raise typer.Exit(1)


_BackupFile = Annotated[Path, typer.Argument(help="The backup, an SQLite file.", metavar="FILE", dir_okay=False)]
_StoreUrl = Annotated[str | None, typer.Option("--store", help="The store; by default BATCHNORM_STORE.")]


@app.command("backup")
def _backup(file: _BackupFile, store: _StoreUrl = None) -> None:
    """Write a backup of the store to FILE, also while the service runs. An earlier backup of that name is replaced.

    Exit status: 0 if FILE is complete and checked, 1 if it could not be written, 2 for invalid arguments.
    """
    with _failing():
        source = _store_of(store, target=False)
        with _progress_bar() as progress:
            report = backup(source, file, progress)
    typer.echo(f"{file}: backup complete and checked" + (f"; {_counts(report)}" if report else ""))
    if report is not None and report.changed:
        typer.echo(f"changed during the backup, which has them as they were before: {_join_names(report.changed)}")


@app.command("restore")
def _restore(
    file: _BackupFile,
    store: _StoreUrl = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the SQLite file, or layers in Valkey that differ.")
    ] = False,
) -> None:
    """Check the backup FILE, and restore it to the store. Stop all services first.

    Exit status: 0 if everything was restored, 1 if not, 2 for invalid arguments and damaged files.
    """
    with _failing():
        into = _store_of(store, target=True)
        with _progress_bar() as progress:
            report = restore(into, file, progress, overwrite=overwrite)
    typer.echo(f"{file}: restored" + (f"; {_summary(report)}" if report else ""))
    if report is not None and not report.complete:
        raise typer.Exit(1)


def _store_of(url: str | None, *, target: bool) -> Store:
    settings = Settings() if url is None else Settings(store=url)
    try:
        return store_to_move(settings.store, settings, target=target)
    except StoreRefusedError as error:
        _fail(str(error), code=2)


@contextmanager
def _failing() -> Iterator[None]:
    """Turn the errors of a backup into exit statuses."""
    try:
        yield
    except ValidationError as error:
        _fail("; ".join(_describe_error(details["loc"], details["msg"], {}) for details in error.errors()), code=2)
    except (StoreDamagedError, SameStoreError) as error:
        _fail(str(error), code=2)
    except (StoreRefusedError, StoreError) as error:
        _fail(str(error), code=1)
    except KeyboardInterrupt:
        _fail("stopped", code=130)


def _summary(report: Report) -> str:
    lines = [f"{_counts(report)}; all read back"]
    if report.differing:
        lines.append(f"left alone, the target has them otherwise (--overwrite): {_join_names(report.differing)}")
    if report.changed:
        lines.append(f"changed meanwhile; stop all services and repeat the command: {_join_names(report.changed)}")
    return "\n".join(lines)


def _counts(report: Report) -> str:
    return (
        f"{_count(report.copied, 'layer')} copied, {report.present} there and equal,"
        f" {_count(report.kept, 'earlier state')}, {_count(report.pins, 'pin')}, {_count(report.receipts, 'receipt')}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _join_names(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


@contextmanager
def _progress_bar() -> Iterator[ProgressCallback]:
    """Show a progress bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks = {
            name: bar.add_task(name, total=None, visible=False) for name in ("pages", "listing", "layers", "receipts")
        }
        yield lambda what, done, total: bar.update(tasks[what], completed=done, total=total, visible=True)


def _announce(url: str, settings: Settings, store: str) -> None:
    unknown = unknown_variables()
    if unknown:
        log.warning("no setting reads these environment variables: %s", ", ".join(unknown))
    if not settings.has_tokens and not _is_local(settings.host):
        log.warning("whoever reaches %s may change every layer: set %sTOKENS_FILE, or guard the port", url, PREFIX)
    variable = f"{PREFIX}TOKEN" if settings.token is not None else f"{PREFIX}CLIENT_TOKEN"
    token = f" -H 'Authorization: Bearer '\"${variable}\"" if settings.has_tokens else ""
    json = " -H 'Content-Type: application/json'"
    page = f"\n  page     {url}/ui" if settings.ui else ""
    typer.echo(f"""batchnorm-service {__version__}
  address  {url}
  store    {store}
  docs     {url}/docs{page}
Try it:
  curl -X PUT {url}/v1/layers/demo{token}{json} -d '{{"num_features": 2}}'
  curl {url}/v1/layers/demo/train{token}{json} -d '{{"input": [[1, 2], [3, 4], [5, 9]]}}'""")
    sys.stdout.flush()


def _is_local(host: str) -> bool:
    """Whether an address or host name is reachable only from this machine."""
    if not host:
        return False  # every address
    try:
        # The first address, as for listening.
        host = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])
    except (OSError, UnicodeError):
        return True  # nobody can reach it: listening will fail, and say why
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _describe_error(location: tuple[int | str, ...], message: str, flags: dict[str, Any]) -> str:
    name = str(location[0]) if location else ""
    message = message.removeprefix("Value error, ")
    if not name:
        return message
    if name == "device":
        message = "must be cpu, cuda or cuda:N"  # instead of pydantic's message with the regular expression
    return f"{'--' + name.replace('_', '-') if name in flags else PREFIX + name.upper()}: {message}"


def _fail(message: str, *, code: int) -> NoReturn:
    typer.echo(f"batchnorm-service: {message}", err=True)
    raise typer.Exit(code)
