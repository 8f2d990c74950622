"""Creates the application from settings, store, layers and REST interface."""

from __future__ import annotations

import asyncio
import platform
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import torch
from fastapi import FastAPI
from pydantic import SecretStr

from batchnorm_service import __version__
from batchnorm_service.layers import DriftOptions, Layers, LayersOptions
from batchnorm_service.open_files import possible_connections
from batchnorm_service.open_inference import INTERFACE as OPEN_INFERENCE
from batchnorm_service.rest import ApiOptions, Gateway, RequestLimits, build_api
from batchnorm_service.rest.application import all_routers
from batchnorm_service.rest.interface import Interface, RouteTable
from batchnorm_service.rest.security import Guard
from batchnorm_service.rest.shares import group_share
from batchnorm_service.settings import PREFIX, Settings
from batchnorm_service.store.base import Store
from batchnorm_service.store.measured import measured
from batchnorm_service.store.registry import store_from_url
from batchnorm_service.telemetry import Metrics, RequestLog, Traces
from batchnorm_service.telemetry.traces import TracesRefusedError
from batchnorm_service.tokens import TokenFile, create_file
from batchnorm_service.ui import INTERFACE as UI

INTERFACES: Final[tuple[Interface, ...]] = (OPEN_INFERENCE, UI)
"""The interfaces beside REST."""

ROUTES: Final = RouteTable(all_routers(INTERFACES))
"""The routes of all interfaces."""

_GAUGES_SECONDS: Final = 1.0


def create_app(
    settings: Settings | None = None,
    store: Store | None = None,
    metrics_directory: Path | None = None,
    traces: Traces | None = None,
) -> Gateway:
    """The service as an ASGI application. Its lifespan opens the store and the layers, and closes them.

    Args:
        settings: by default, read from the environment.
        store: a store that is not open yet; by default, the one that `settings.store` names.
        metrics_directory: where the processes of the service share their metrics; None if this is the only one.
        traces: by default, if `settings.traces` says so, those that the environment configures.

    Raises:
        StoreRefusedError: `settings.store` is invalid.
        TokenFileError: `settings.tokens_file` cannot be read or made, or is damaged.
        TracesRefusedError: traces cannot be exported.
    """
    settings = settings or Settings()
    guard = make_guard(settings)
    traces = traces or make_traces(settings)
    store = store or make_store(settings)
    torch.set_num_threads(settings.threads)
    metrics = _metrics(metrics_directory) if settings.metrics else None
    layers = Layers(
        measured(store, metrics) if metrics else store,
        LayersOptions(
            device=settings.device,
            max_layers=settings.max_layers,
            max_features=settings.max_features,
            resident_layers=settings.resident_layers,
            queue_length=settings.queue_length,
            store_timeout=settings.store_timeout_seconds,
            inline_bytes=settings.inline_bytes,
            max_staleness=settings.max_staleness_ms / 1000,
            history_length=settings.history_length,
            history_seconds=settings.history_seconds,
            max_pins=settings.max_pins,
            max_waiting_members=group_share(settings.max_concurrent_requests),
            waiting_calls=settings.max_waiting_calls,
            drift=DriftOptions(settings.drift_threshold, settings.drift_sampling) if settings.drift else None,
        ),
        metrics=metrics,
        traced=traces is not None,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        await store.open()
        try:
            await layers.open()
            try:
                async with _reading_gauges(metrics if metrics_directory else None):
                    yield
            finally:
                await layers.close()
        finally:
            await store.close()
            if traces is not None:
                await asyncio.to_thread(traces.close)

    gateway = build_api(
        layers,
        ApiOptions(
            max_body_bytes=settings.max_body_bytes,
            max_elements=settings.max_elements or settings.max_body_bytes // 2,
            max_concurrent_requests=settings.max_concurrent_requests,
            read_timeout=settings.read_timeout_seconds,
            write_timeout=settings.write_timeout_seconds,
            max_buffered_bytes=settings.max_buffered_bytes,
            max_connections=possible_connections(settings.max_connections),
            limits=RequestLimits(settings.max_header_bytes, settings.max_headers, settings.max_url_bytes),
            fast_path=settings.fast_path,
            guard=guard,
            log=RequestLog(access=settings.access_log, slow_seconds=settings.slow_call_seconds),
            traces=traces,
        ),
        lifespan,
        metrics,
        [interface for interface in INTERFACES if interface is not UI or settings.ui],
    )
    gateway.app.state.settings, gateway.app.state.store = settings, store
    return gateway


def _metrics(directory: Path | None) -> Metrics:
    build = {"version": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return Metrics({"route": ROUTES.templates(), **{label: (value,) for label, value in build.items()}}, directory)


@asynccontextmanager
async def _reading_gauges(metrics: Metrics | None) -> AsyncGenerator[None]:
    """Read the gauges regularly, for the other processes: Prometheus asks any of them."""

    async def read_regularly(metrics: Metrics) -> None:
        while True:
            metrics.read_gauges()
            await asyncio.sleep(_GAUGES_SECONDS)

    if metrics is None:
        yield
        return
    task = asyncio.create_task(read_regularly(metrics))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def make_store(settings: Settings) -> Store:
    """Create the store that `settings.store` names, without opening it. Raises `StoreRefusedError` if it is invalid."""
    return store_from_url(settings.store, settings.store_options())


def make_traces(settings: Settings) -> Traces | None:
    """The traces that the environment configures; None if they are off. Raises `TracesRefusedError`."""
    if not settings.traces:
        return None
    try:
        from batchnorm_service.telemetry.otel import traces_from_environment  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise TracesRefusedError(
            f"{PREFIX}TRACES needs OpenTelemetry: pip install 'batchnorm-service[service,otel]' ({error})"
        ) from error
    return traces_from_environment()


def make_guard(settings: Settings) -> Guard:
    """Access control with all tokens of the settings. Makes the token file, and prints its token, if it is missing."""
    file = None if settings.tokens_file is None else open_token_file(settings.tokens_file)
    closed = frozenset({"/metrics"}) if settings.metrics_token_required else frozenset[str]()
    return Guard(_text(settings.token), _text(settings.read_token), file, closed=closed)


def open_token_file(path: Path) -> TokenFile:
    """The token file. If it does not exist, it is made with an admin token, which is printed: there is no other copy.

    Raises:
        TokenFileError: it cannot be read or made, or is damaged.
    """
    token = create_file(path)
    if token is not None:
        sys.stdout.write(f"{path} is new; its admin token is shown only now: {token}\n")
        sys.stdout.flush()
    return TokenFile(path)


def _text(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
