"""Every setting of the service, as environment variables with the prefix BATCHNORM_."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import quote

import platformdirs
from pydantic import Field, SecretStr, StringConstraints, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from batchnorm_service.store.base import StoreOptions

PREFIX = "BATCHNORM_"

LogLevel = Literal["debug", "info", "warning", "error"]
Device = Annotated[str, StringConstraints(pattern=r"^(cpu|cuda(:(0|[1-9][0-9]{0,2}))?)$")]


def default_store() -> str:
    """An SQLite file in the user's data directory."""
    path = Path(platformdirs.user_data_dir("batchnorm-service", appauthor=False)) / "layers.db"
    return f"sqlite:///{quote(str(path.absolute()))}"


class Settings(BaseSettings):
    """What an operator may set. `docs/settings.md` has the same as a table."""

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
    """Where layers live whose config names no device: `cpu`, `cuda` or `cuda:N`."""

    log_level: LogLevel = "info"
    """What is logged: `debug` (a line per request), `info`, `warning` or `error`."""

    max_body_bytes: int = Field(64 << 20, ge=1 << 10, le=1 << 40)
    """The largest request body; larger ones get 413."""

    max_elements: int | None = Field(None, ge=1, le=1 << 40)
    """The most elements of a batch, a dimension of 0 counted as 1; by default half of max_body_bytes. More get 413."""

    max_layers: int = Field(1_000_000, ge=1)
    """How many layers the store may hold; one more gets 409."""

    resident_layers: int = Field(10_000, ge=1)
    """How many layers stay in memory; others are loaded from the store when they are used."""

    queue_length: int = Field(1024, ge=1)
    """How many calls may wait for one layer's commits; one more gets 503."""

    receipt_seconds: float = Field(3600, gt=0, allow_inf_nan=False)
    """How long an Idempotency-Key is remembered, at least twice as long as `store_timeout_seconds`. Each train call
    leaves a receipt of some 120 bytes for so long."""

    store_timeout_seconds: float = Field(10, gt=0, allow_inf_nan=False)
    """How long a call waits for a store that does not answer before it gets 503."""

    store_call_timeout_seconds: float = Field(5, gt=0, allow_inf_nan=False)
    """How long one round trip to a Valkey server may take."""

    store_connections: int = Field(2, ge=1)
    """Connections to each Valkey server."""

    store_wait_replicas: int = Field(0, ge=0)
    """How many Valkey replicas must have a change before it is acknowledged; see docs/durability.md."""

    store_wait_timeout_seconds: float = Field(1, gt=0, allow_inf_nan=False)
    """How long a call waits for those replicas before it gets 503."""

    max_staleness_ms: float = Field(0, ge=0, allow_inf_nan=False)
    """For how long an answer may rest on an earlier look at a shared store; 0: every call looks."""

    workers: int = Field(1, ge=1, le=1024)
    """Processes that share the port and the store. Each has a cache of its own: a store in memory cannot serve them."""

    max_concurrent_requests: int = Field(512, ge=1)
    """How many calls may run at once; one more gets 503. Times the largest body, it bounds their memory."""

    read_timeout_seconds: float = Field(30, gt=0, allow_inf_nan=False)
    """A request gets 408 when nothing of it comes for so long, or after so long less than 1 KiB/s on average."""

    write_timeout_seconds: float = Field(30, gt=0, allow_inf_nan=False)
    """A response is dropped when nothing of it is taken for so long, or after so long less than 1 KiB/s on average."""

    max_buffered_bytes: int = Field(1 << 30, ge=1)
    """Bytes of incomplete request bodies and unsent responses, per process, from which on new requests get 503."""

    threads: int = Field(1, ge=1, le=1024)
    """Torch's intra-op threads. Results depend on their number: keep it the same on every replica."""

    inline_bytes: int = Field(1 << 20, ge=0)
    """Up to this size bodies are read and batches computed on the event loop; larger ones, and on CUDA, in a thread."""

    token: SecretStr | None = None
    """A bearer token that allows every call. Once it is set, every path needs a token except those that are open."""

    read_token: SecretStr | None = None
    """A second bearer token, which allows GET and eval only."""

    fast_path: bool = True
    """Whether train, eval, inverse and moments go from the HTTP parser to their responses without ASGI in between."""

    shutdown_seconds: int = Field(30, ge=0)
    """How long a stop waits for requests in flight."""

    def store_options(self) -> StoreOptions:
        """What a store is told when it is made."""
        return StoreOptions(
            self.receipt_seconds,
            exclusive=self.workers == 1,
            connections=self.store_connections,
            timeout=self.store_call_timeout_seconds,
            wait_replicas=self.store_wait_replicas,
            wait_timeout=self.store_wait_timeout_seconds,
        )

    @model_validator(mode="after")
    def _receipts_outlive_retries(self) -> Self:
        # A commit that lost its reply is repeated until the timeout: without its receipt it would count twice.
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
                if not text or not (text.isascii() and text.isprintable()) or " " in text:
                    raise ValueError(f"{PREFIX}{name.upper()} must be printable ASCII without spaces, and not empty")
        if self.read_token is not None and self.token is None:
            raise ValueError(f"{PREFIX}READ_TOKEN needs {PREFIX}TOKEN: without one the service would be open to all")
        return self


def export(given: Mapping[str, object]) -> None:
    """Set flags as environment variables, so that worker processes have them too."""
    os.environ |= {PREFIX + name.upper(): str(value) for name, value in given.items()}


def unknown_variables(names: Iterable[str] | None = None) -> list[str]:
    """Variables with the prefix that no setting reads, each with the one that may have been meant."""
    others = ("url", "migrate_from", "migrate_to")  # of the client, and of the command that moves a store
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
