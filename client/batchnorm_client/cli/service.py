"""The client of a command, and how failures become messages and exit statuses."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from batchnorm_client.client import Client
from batchnorm_client.core import Retry
from batchnorm_client.options import HttpOptions
from batchnorm_client.wire.documents import Layer
from batchnorm_client.wire.errors import (
    BatchNormError,
    ConnectionFailed,
    DigestMismatch,
    LayerNotFound,
    LayerPinned,
    PayloadTooLarge,
    ProblemError,
    Unauthenticated,
    UnexpectedAnswer,
    VersionMismatch,
    VersionNotFound,
)

USAGE: Final = 2
NOT_FOUND: Final = 3
REFUSED: Final = 4
SERVICE: Final = 5
INTERRUPTED: Final = 130

EXIT_CODES: Final = (
    "[b]Exit status[/b]: 0 done; 1 not confirmed, a file cannot be written, or a bug in this program; 2 wrong "
    "arguments or an unreadable file; 3 no such layer, state or pin; 4 the service refused the call (4xx), which "
    "changed nothing; 5 the service failed (5xx) or cannot be reached; 130 interrupted."
)

QUICK: Final = Retry(attempts=4)
"""For commands that a person waits for: half a second is enough to notice that no service is there."""

PATIENT: Final = Retry(attempts=1000, deadline=120)
"""For long runs, which should survive a restart of the service."""

_QUIET_SECONDS: Final = 1.0
"""Retries are shown only by commands that take longer."""

Url = Annotated[
    str | None,
    typer.Option(
        envvar="BATCHNORM_URL",
        metavar="URL",
        help="The service's address; http://127.0.0.1:8000 by default.",
        rich_help_panel="Service",
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="The bearer token, if the service asks for one; BATCHNORM_CLIENT_TOKEN by default. Other users of this "
        "machine see arguments, but neither the environment nor your files.",
        rich_help_panel="Service",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file that contains the token; BATCHNORM_CLIENT_TOKEN_FILE by default.",
        rich_help_panel="Service",
    ),
]
Cacert = Annotated[
    Path | None,
    typer.Option(
        envvar="BATCHNORM_CLIENT_CACERT",
        metavar="FILE",
        help="Certificate authorities to trust (PEM); with https.",
        rich_help_panel="Service",
    ),
]
Cert = Annotated[
    Path | None,
    typer.Option(
        envvar="BATCHNORM_CLIENT_CERT",
        metavar="FILE",
        help="A client certificate (PEM), if the service asks for one.",
        rich_help_panel="Service",
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(
        envvar="BATCHNORM_CLIENT_KEY",
        metavar="FILE",
        help="The key of --cert, if that does not contain it.",
        rich_help_panel="Service",
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The layer's name.", show_default=False)]
IfMatch = Annotated[
    int | None, typer.Option(metavar="VERSION", help="Only if the layer has this version.", show_default=False)
]
At = Annotated[
    str | None,
    typer.Option(
        metavar="VERSION|TAG", help="A kept state: its version, or the tag of a pin. By default the newest state."
    ),
]
Expect = Annotated[
    str | None, typer.Option(metavar="DIGEST", help="Only if the state has this digest.", show_default=False)
]


@dataclass(frozen=True, slots=True)
class Service:
    """Where the service is, and with what a command is let in: options of every command."""

    url: Url = None
    token: Token = None
    token_file: TokenFile = None
    cacert: Cacert = None
    cert: Cert = None
    key: Key = None

    def client(self, retry: Retry) -> Client:
        """A client for it. Raises `ValueError` and `OSError` as `Client` does."""
        options: HttpOptions = {}
        if self.cacert is not None:
            options["verify"] = self.cacert
        if self.cert is not None:
            options["cert"] = self.cert if self.key is None else (self.cert, self.key)
        elif self.key is not None:
            raise ValueError("--key needs --cert")
        return Client(self.url, token=self.token or None, token_file=self.token_file, retry=retry, **options)


def with_service(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `Service`, and passes them as its argument `service`."""
    options = inspect.signature(Service, eval_str=True).parameters

    @wraps(command)
    def run(**arguments: Any) -> None:
        command(service=Service(**{name: arguments.pop(name) for name in options}), **arguments)

    parameters = [
        option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        for option in (options.values() if parameter.name == "service" else (parameter,))
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    return run


@contextmanager
def calling(service: Service, retry: Retry = QUICK) -> Iterator[Client]:
    """A client for the service. A failure is reported in one line on stderr and by the exit status."""
    try:
        client = service.client(retry)
    except ValueError as error:
        fail(str(error), USAGE)
    except OSError as error:
        fail(_file_error(error), USAGE)
    with client, _quiet_at_first():
        try:
            yield client
        except BatchNormError as error:
            fail(sentence(error), exit_code(error))
        except KeyboardInterrupt as interrupt:
            fail("; ".join(["interrupted", *getattr(interrupt, "__notes__", [])]), INTERRUPTED)
        except TypeError as error:  # a dtype that cannot be sent
            fail(str(error), USAGE)
        except OSError as error:
            fail(_file_error(error), 1)


@contextmanager
def _quiet_at_first() -> Iterator[None]:
    """Hide the client's warnings, which Python prints on stderr, until the command takes longer."""
    logger, start = logging.getLogger("batchnorm_client"), time.monotonic()

    def is_late(_record: logging.LogRecord) -> bool:
        return time.monotonic() - start >= _QUIET_SECONDS

    logger.addFilter(is_late)
    try:
        yield
    finally:
        logger.removeFilter(is_late)


def exit_code(error: BatchNormError) -> int:
    """The exit status for this failure."""
    if isinstance(error, LayerNotFound | VersionNotFound):
        return NOT_FOUND
    if isinstance(error, ProblemError | UnexpectedAnswer) and 400 <= error.status < 500:
        return REFUSED
    return SERVICE


def sentence(error: BatchNormError) -> str:
    """The failure in one line."""
    text = _in_terms_of_options(error, " ".join(str(error).split()))
    if error.outcome_unknown:
        text += "; the call may have taken effect all the same"
    text = "; ".join([text, *getattr(error, "__notes__", [])])
    if isinstance(error, ConnectionFailed) and not error.outcome_unknown and error.proxy is None:
        text += "; --url or BATCHNORM_URL says where the service is"
    request_id = getattr(error, "request_id", None)
    if exit_code(error) == SERVICE and request_id:
        text += f" (request {request_id})"
    return text


def _in_terms_of_options(error: BatchNormError, text: str) -> str:
    """The service's text in terms of this command: it mentions HTTP headers and calls."""
    match error:
        case LayerNotFound() | VersionNotFound() | PayloadTooLarge():
            return text.partition(";")[0]
        case LayerPinned():
            return f"{text.partition(';')[0]}; --with-pins deletes them, too"
        case DigestMismatch():
            return f"{text} than --expect: {error.fields.get('expected')}"
        case Unauthenticated():
            return f"{text.partition(':')[0]}; give one with --token-file, --token or BATCHNORM_CLIENT_TOKEN"
        case VersionMismatch():
            return f"{text}, not the one in --if-match"
        case _:
            return text


def fail(message: str, code: int) -> NoReturn:
    """Print what went wrong, and exit with this status."""
    typer.echo(f"batchnorm: {message}", err=True)
    raise typer.Exit(code)


def size(layer: Layer) -> str:
    """A layer in a few words."""
    channels = count(layer.config.num_features, "channel")
    return f"{channels}, {count(layer.num_batches_tracked, 'batch')}, version {layer.version:,}"


def count(number: int, noun: str) -> str:
    """A number with its noun, such as "3 batches"."""
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{ending}"


def _file_error(error: OSError) -> str:
    where = f"{Path(error.filename)}: " if isinstance(error.filename, str) else ""
    return f"{where}{error.strerror or error}"
