"""Runs the application under uvicorn: socket, signals, and a graceful shutdown with exit status 0."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from batchnorm_service.app import create_app
from batchnorm_service.fast_path.protocol import Protocol
from batchnorm_service.memory import settle_memory
from batchnorm_service.rest import Gateway
from batchnorm_service.settings import Settings
from batchnorm_service.telemetry.logs import configure_logging

BACKLOG = 2048
_SIGNALS = signal.SIGTERM, signal.SIGINT

Announce = Callable[[str, Settings, str], None]
"""Called with the service's URL, the settings, and the store's URL, once the service listens."""


class PortUnavailableError(Exception):
    """The service cannot listen on the address; the message says why."""


class CertificateError(Exception):
    """The certificate or its key cannot be used; the message says why."""


class Server(uvicorn.Server):
    """uvicorn server that leaves signals to `run`, and calls `started` when it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        settle_memory()
        self._started()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Do nothing: uvicorn would raise the signal again after its graceful shutdown, for an exit status of 143."""
        yield


def run(settings: Settings, announce: Announce) -> None:
    """Serve until SIGTERM or SIGINT; return when all running calls are committed and responded to.

    Args:
        settings: the service's settings.
        announce: called once the service listens.

    Raises:
        PortUnavailableError: the service cannot listen on the address.
        CertificateError: the certificate or its key cannot be used.
        StoreRefusedError: the store cannot be opened.
        TokenFileError: the token file cannot be read or made, or is damaged.
        DeviceUnavailable: the default device is not available.
        TracesRefusedError: traces cannot be exported.
    """
    set_up_logging(settings)
    check_certificate(settings)
    with listen(settings.host, settings.port) as listener:
        gateway = create_app(settings)
        # `serve` runs the lifespan, so that its errors reach the caller instead of uvicorn's log.
        config = uvicorn_config(settings, gateway, lifespan="off")
        url = address(settings, listener)
        server = Server(config, lambda: announce(url, settings, gateway.app.state.store.url))
        with _signals(server), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(serve(server, gateway, listener))


def uvicorn_config(settings: Settings, app: Gateway | Callable[[], Gateway], **options: Any) -> uvicorn.Config:
    """uvicorn's configuration to serve `app`."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type] # seconds of `call_later`
        timeout_graceful_shutdown=settings.shutdown_seconds,
        **_tls_options(settings),
        **options,
    )


def _tls_options(settings: Settings) -> dict[str, Any]:
    if settings.ssl_certfile is None:
        return {}
    return {
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_keyfile_password": _password(settings),
        "ssl_ca_certs": settings.ssl_ca_certs and str(settings.ssl_ca_certs),
        "ssl_cert_reqs": ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    }


def check_certificate(settings: Settings) -> None:
    """Load what TLS needs, before anything is started. Raises `CertificateError`."""
    if settings.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files = [str(file) for file in (settings.ssl_certfile, settings.ssl_keyfile) if file is not None]
    try:
        # Without a password, OpenSSL would ask the terminal for it.
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, _password(settings) or "")
        if settings.ssl_ca_certs is not None:
            files = [str(settings.ssl_ca_certs)]
            context.load_verify_locations(settings.ssl_ca_certs)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise CertificateError(f"TLS with {' and '.join(files)}: {reason}") from error


def _password(settings: Settings) -> str | None:
    secret = settings.ssl_keyfile_password
    return None if secret is None else secret.get_secret_value()


@contextlib.contextmanager
def _signals(server: Server) -> Generator[None, None, None]:
    """Stop the server on SIGTERM and SIGINT; a second SIGINT cancels running requests, as in uvicorn.

    Afterwards these signals are ignored, so that they do not kill the process while it commits and exits.
    """
    for number in _SIGNALS:
        signal.signal(number, server.handle_exit)
    try:
        yield
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


async def serve(server: Server, gateway: Gateway, listener: socket.socket) -> None:
    """Serve until the server is told to exit, within the application's lifespan, whose errors are raised."""
    async with gateway.app.router.lifespan_context(gateway.app):
        if not server.should_exit:
            await server.serve(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        PortUnavailableError: the service cannot listen on the address.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise PortUnavailableError(f"cannot listen on {host} port {port}: {_reason(error)}") from error


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "no such name"  # Python names the codec that could not encode it
    if error.errno and error.errno > 0:
        return os.strerror(error.errno)  # str(error) would repeat the address
    return error.strerror or str(error)


def set_up_logging(settings: Settings) -> None:
    """Configure the log; uvicorn's messages below warnings only at the debug level."""
    configure_logging(settings.log_level)
    level = settings.log_level.upper() if settings.log_level in {"debug", "error"} else "WARNING"
    logging.getLogger("uvicorn").setLevel(level)
    logging.getLogger("uvicorn.error").addFilter(_is_not_cancellation)
    logging.getLogger("asyncio").setLevel("WARNING")


def _is_not_cancellation(record: logging.LogRecord) -> bool:
    """Drop the tracebacks that uvicorn logs when a forced shutdown cancels calls or a worker's lifespan.

    The shutdown was requested, and the calls get 503.
    """
    cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not (cancelled or record.getMessage().rstrip().endswith("CancelledError"))


def address(settings: Settings, listener: socket.socket) -> str:
    """The URL at which the service can be reached from this machine."""
    host, port = settings.host, listener.getsockname()[1]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared, not bound
    scheme = "http" if settings.ssl_certfile is None else "https"
    return f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"
