"""Creates the application from settings, store, layers and REST interface."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI
from pydantic import SecretStr

from batchnorm_service.layers import Layers, LayersOptions
from batchnorm_service.rest import ApiOptions, Gateway, build_api
from batchnorm_service.rest.security import Guard
from batchnorm_service.settings import Settings
from batchnorm_service.store.base import Store
from batchnorm_service.store.registry import store_from_url


def create_app(settings: Settings | None = None, store: Store | None = None) -> Gateway:
    """The service as an ASGI application. Its lifespan opens the store and the layers, and closes them.

    Args:
        settings: by default, read from the environment.
        store: a store that is not open yet; by default, the one that `settings.store` names.

    Raises:
        StoreRefusedError: `settings.store` is invalid.
    """
    settings = settings or Settings()
    store = store or make_store(settings)
    torch.set_num_threads(settings.threads)
    layers = Layers(
        store,
        LayersOptions(
            device=settings.device,
            max_layers=settings.max_layers,
            resident_layers=settings.resident_layers,
            queue_length=settings.queue_length,
            store_timeout=settings.store_timeout_seconds,
            inline_bytes=settings.inline_bytes,
            max_staleness=settings.max_staleness_ms / 1000,
            history_length=settings.history_length,
            history_seconds=settings.history_seconds,
            max_pins=settings.max_pins,
        ),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        await store.open()
        try:
            await layers.open()
            try:
                yield
            finally:
                await layers.close()
        finally:
            await store.close()

    gateway = build_api(
        layers,
        ApiOptions(
            max_body_bytes=settings.max_body_bytes,
            max_elements=settings.max_elements or settings.max_body_bytes // 2,
            max_concurrent_requests=settings.max_concurrent_requests,
            read_timeout=settings.read_timeout_seconds,
            write_timeout=settings.write_timeout_seconds,
            max_buffered_bytes=settings.max_buffered_bytes,
            fast_path=settings.fast_path,
            guard=Guard(token=_text(settings.token), read_token=_text(settings.read_token)),
        ),
        lifespan,
    )
    gateway.app.state.settings, gateway.app.state.store = settings, store
    return gateway


def make_store(settings: Settings) -> Store:
    """Create the store that `settings.store` names, without opening it. Raises `StoreRefusedError` if it is invalid."""
    return store_from_url(settings.store, settings.store_options())


def _text(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
