"""A store that reports how long its operations take, and their results."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import cache, partial
from typing import Any, Final, cast

from ..runtime import RUNTIME, Runtime
from ..telemetry import Reporter
from ..telemetry.metrics import LABELS, STORE_SECONDS
from ..telemetry.registry import Histogram
from .base import Store

_RESULTS: Final = frozenset(LABELS["result"])


def measured(store: Store, metrics: Reporter, runtime: Runtime = RUNTIME) -> Store:
    """The same store, whose operations of `LABELS["operation"]` are reported."""
    return cast(Store, _MeasuredStore(store, metrics, runtime))


class _MeasuredStore:
    """Everything else is the store's own; `exclusive` may change while it is open."""

    def __init__(self, store: Store, metrics: Reporter, runtime: Runtime) -> None:
        self._store = store
        for operation in LABELS["operation"]:
            histograms = {result: metrics.histogram(STORE_SECONDS, operation, result) for result in _RESULTS}
            setattr(self, operation, _measured(partial(getattr, store, operation), histograms, runtime))

    @property
    def exclusive(self) -> bool:
        return self._store.exclusive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@cache
def _result(kind: str) -> str:
    """The label of a result: its type's name in snake case, if that is one of the table."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()
    return name if name in _RESULTS else "ok"


def _measured(
    operation: Callable[[], Callable[..., Awaitable[Any]]], histograms: dict[str, Histogram], runtime: Runtime
) -> Callable[..., Awaitable[Any]]:
    async def measure(*args: Any, **options: Any) -> Any:
        began, result = runtime.now(), "error"
        try:
            found = await operation()(*args, **options)
            result = _result(type(found).__name__)
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        finally:
            histograms[result].observe(runtime.now() - began)
        return found

    return measure
