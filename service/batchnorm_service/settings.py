"""The service's settings: environment variables with the prefix BATCHNORM_."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import quote

import platformdirs
from pydantic import BeforeValidator, Field, SecretStr, StringConstraints, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from batchnorm_service.store.base import StoreOptions
from batchnorm_service.tokens import MAX_TOKEN_BYTES

PREFIX = "BATCHNORM_"

LogLevel = Literal["debug", "info", "warning", "error"]
Device = Annotated[str, StringConstraints(pattern=r"^(cpu|cuda(:(0|[1-9][0-9]{0,2}))?)$")]


def default_store() -> str:
    """An SQLite file in the user's data directory."""
    path = Path(platformdirs.user_data_dir("batchnorm-service", appauthor=False)) / "layers.db"
    return f"sqlite:///{quote(str(path.absolute()))}"


class Settings(BaseSettings):
    """The service's settings; `docs/settings.md` lists them in a table."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, use_attribute_docstrings=True, frozen=True, hide_input_in_errors=True
    )

    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 for every IPv4 address of the machine."""

    port: int = Field(8000, ge=0, le=65535)
    """The TCP port to listen on; 0 for any that is free."""

    store: str = Field(default_factory=default_store)
    """Where layers are kept, as a URL: `memory:` or `sqlite:////absolute/file.db`."""

    device: Device = "cpu"
    """The device of layers whose config names none: `cpu`, `cuda` or `cuda:N`."""

    log_level: LogLevel = "info"
    """The log level: `debug`, `info`, `warning` or `error`."""

    access_log: bool = False
    """Whether every request is logged, at the level `info`."""

    slow_call_seconds: float = Field(1, ge=0, allow_inf_nan=False)
    """Requests that take this long are logged, at the level `warning`; 0 for none."""

    max_body_bytes: int = Field(64 << 20, ge=1 << 10, le=1 << 40)
    """The largest request body; larger ones get 413."""

    max_elements: int | None = Field(None, ge=1, le=1 << 40)
    """Maximum elements of a batch, a dimension of 0 counted as 1; by default half of max_body_bytes. More get 413."""

    max_layers: int = Field(1_000_000, ge=1)
    """Maximum number of layers in the store; creating more gets 409."""

    max_features: int = Field(1 << 20, ge=1, le=1 << 20)
    """Maximum number of features of a new layer; more get 422."""

    resident_layers: int = Field(10_000, ge=1)
    """Maximum number of layers cached in memory; others are loaded from the store when they are used."""

    queue_length: int = Field(1024, ge=1)
    """Maximum queued updates per layer; beyond it calls get 503."""

    history_length: int = Field(20, ge=0, le=1000)
    """How many states of a layer are kept, besides pinned ones; 0 keeps none. A layer takes at most
    (1 + history_length + max_pins) times the size of its state."""

    history_seconds: float = Field(60, ge=0, allow_inf_nan=False)
    """Seconds between two kept states while batches come. The state before a reset, PATCH, PUT state or rollback is
    always kept; setting only weight and bias counts as a batch."""

    max_pins: int = Field(100, ge=0, le=10_000)
    """Maximum number of pins of a layer; more get 409."""

    receipt_seconds: float = Field(3600, gt=0, allow_inf_nan=False)
    """How long an Idempotency-Key is remembered, at least twice `store_timeout_seconds`. Each train call stores a
    receipt of about 120 bytes for this time."""

    store_timeout_seconds: float = Field(10, gt=0, allow_inf_nan=False)
    """How long a call retries when the store does not respond, before it gets 503."""

    store_call_timeout_seconds: float = Field(5, gt=0, allow_inf_nan=False)
    """Timeout of a round trip to a Valkey server."""

    store_connections: int = Field(2, ge=1)
    """Number of connections to each Valkey server."""

    store_wait_replicas: int = Field(0, ge=0)
    """How many Valkey replicas must have a write before it is acknowledged; see docs/durability.md."""

    store_wait_timeout_seconds: float = Field(1, gt=0, allow_inf_nan=False)
    """How long a call waits for these replicas, before it gets 503."""

    integrity_check_bytes: int = Field(64 << 20, ge=0)
    """An SQLite file up to this size is checked for damage at start; 0 turns the check off."""

    max_staleness_ms: float = Field(0, ge=0, allow_inf_nan=False)
    """How long a check of a shared store stays valid for later calls; 0: every call checks."""

    workers: int = Field(1, ge=1, le=1024)
    """Number of processes that share the port and the store. With more than 1, the store cannot be in memory."""

    max_concurrent_requests: int = Field(512, ge=1)
    """Maximum concurrent calls; beyond it calls get 503. Times the largest body, it bounds their memory. From 16 on,
    some are kept free for layers with few calls."""

    max_waiting_calls: int = Field(10_000, ge=1)
    """Maximum calls that wait until layers change (`wait`), per process; beyond it they get 503. They do not count as
    running. Each holds a connection."""

    read_timeout_seconds: float = Field(30, gt=0, allow_inf_nan=False)
    """A request gets 408 if no byte of it arrives for this time, or after this time less than 1 KiB/s on average."""

    write_timeout_seconds: float = Field(30, gt=0, allow_inf_nan=False)
    """A connection is aborted if the client reads no byte of a response for this time, or after this time less than
    1 KiB/s on average."""

    max_buffered_bytes: int = Field(1 << 30, ge=1)
    """Maximum bytes of incomplete request bodies and unsent responses, per process; beyond it new requests get 503."""

    max_connections: int = Field(10_000, ge=1)
    """Maximum open connections, per process, within the system's limit of open files. Idle ones are closed to make
    room; if there are none, new ones get 503."""

    max_header_bytes: int = Field(1 << 16, ge=1 << 10, le=1 << 24)
    """The largest request without its body: URL, headers and trailers; larger ones get 413."""

    max_headers: int = Field(256, ge=1)
    """Maximum number of headers and trailers of a request; more get 413."""

    max_url_bytes: int = Field(1 << 15, ge=1 << 9, le=1 << 24)
    """The longest path with its query; longer ones get 413."""

    keep_alive_seconds: float = Field(75, gt=0, allow_inf_nan=False)
    """A connection without a request for this time is closed. Clients should close theirs earlier."""

    threads: int = Field(1, ge=1, le=1024)
    """Number of torch's intra-op threads. Results depend on it: use the same number on every replica."""

    inline_bytes: int = Field(1 << 20, ge=0)
    """Bodies up to this size are decoded, and batches computed, on the event loop; larger ones in a thread."""

    token: SecretStr | None = None
    """A bearer token that allows every call. Once there is any token, all paths except the public ones need one."""

    read_token: SecretStr | None = None
    """A second bearer token, which allows calls that change nothing."""

    tokens_file: Annotated[Path | None, BeforeValidator(lambda value: value or None)] = None
    """The file of tokens with scopes and prefixes, made with one admin token if it does not exist; empty for none."""

    insecure: bool = False
    """Whether to serve without tokens at an address that other machines can reach."""

    metrics_token_required: bool = False
    """Whether /metrics needs a token, too."""

    ssl_certfile: Path | None = None
    """The certificate chain for HTTPS (PEM), with the key or beside `ssl_keyfile`; without it, HTTP."""

    ssl_keyfile: Path | None = None
    """The private key of the certificate (PEM)."""

    ssl_keyfile_password: SecretStr | None = None
    """The password of the private key."""

    ssl_ca_certs: Path | None = None
    """Certificates of authorities (PEM): callers must have a certificate that one of them has signed."""

    fast_path: bool = True
    """Whether train, eval, inverse, backward and moments are served without ASGI."""

    ui: bool = True
    """Whether the service has its page, `/ui`, to which `/` leads a browser."""

    metrics: bool = True
    """Whether `/metrics` has metrics for Prometheus, and calls are counted."""

    drift: bool = True
    """Whether batches are compared with what their layers know: `GET /v1/layers/{name}/drift`."""

    drift_threshold: float = Field(0.5, gt=0, allow_inf_nan=False)
    """The score at which a layer drifts; at half of it, it does no longer."""

    drift_sampling: float = Field(0.01, ge=0, le=1, allow_inf_nan=False)
    """The share of a process's time that comparing batches of eval may take; 0: only folded batches are compared."""

    traces: bool = False
    """Whether sampled requests are exported as OpenTelemetry traces, as the standard OTEL_* variables say."""

    shutdown_seconds: int = Field(30, ge=0)
    """How long a shutdown waits for running requests."""

    def store_options(self) -> StoreOptions:
        """The options for creating the store."""
        return StoreOptions(
            self.receipt_seconds,
            exclusive=self.workers == 1,
            connections=self.store_connections,
            timeout=self.store_call_timeout_seconds,
            wait_replicas=self.store_wait_replicas,
            wait_timeout=self.store_wait_timeout_seconds,
            check_bytes=self.integrity_check_bytes,
        )

    @model_validator(mode="after")
    def _receipts_outlive_retries(self) -> Self:
        # A commit with a lost reply is repeated until the timeout: without its receipt it would be applied twice.
        if self.receipt_seconds < 2 * self.store_timeout_seconds:
            raise ValueError(
                f"{PREFIX}RECEIPT_SECONDS ({self.receipt_seconds:g}) must be at least twice"
                f" {PREFIX}STORE_TIMEOUT_SECONDS ({self.store_timeout_seconds:g})"
            )
        return self

    @model_validator(mode="after")
    def _tokens_can_be_sent(self) -> Self:
        for name in ("token", "read_token"):
            secret: SecretStr | None = getattr(self, name)
            if secret is not None:
                text = secret.get_secret_value()
                if not 0 < len(text) <= MAX_TOKEN_BYTES or not (text.isascii() and text.isprintable()) or " " in text:
                    raise ValueError(
                        f"{PREFIX}{name.upper()} must be 1 to {MAX_TOKEN_BYTES} characters of printable ASCII without"
                        " spaces"
                    )
        if self.read_token is not None and self.token is None and self.tokens_file is None:
            raise ValueError(
                f"{PREFIX}READ_TOKEN needs {PREFIX}TOKEN or {PREFIX}TOKENS_FILE: nobody could create or train a layer"
            )
        return self

    @model_validator(mode="after")
    def _tls_has_a_certificate(self) -> Self:
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                raise ValueError(f"{PREFIX}{name.upper()} needs {PREFIX}SSL_CERTFILE")
        return self

    @property
    def has_tokens(self) -> bool:
        """Whether callers need a token."""
        return self.token is not None or self.read_token is not None or self.tokens_file is not None


def export(given: Mapping[str, object]) -> None:
    """Set command-line flags as environment variables, which worker processes inherit."""
    os.environ |= {PREFIX + name.upper(): str(value) for name, value in given.items()}


def unknown_variables(names: Iterable[str] | None = None) -> list[str]:
    """Environment variables with the prefix that are not settings, each with a similar setting's name, if any."""
    # Of the client, and of `batchnorm-service migrate`.
    client = ("url", "client_token", "client_token_file", "client_cacert", "client_cert", "client_key")
    others = (*client, "migrate_from", "migrate_to")
    known = [name.upper() for name in (*Settings.model_fields, *others)]
    unknown = sorted(
        name
        for name in (os.environ if names is None else names)
        if name.upper().startswith(PREFIX) and name.upper().removeprefix(PREFIX) not in known
    )
    described = []
    for name in unknown:
        near = difflib.get_close_matches(name.upper().removeprefix(PREFIX), known, n=1)
        described.append(f"{name} (did you mean {PREFIX}{near[0]}?)" if near else name)
    return described
