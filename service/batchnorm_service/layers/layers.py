"""`Layers`: all operations on named layers, independent of the protocol that calls them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final, ParamSpec, TypeVar

from batchnorm_client.wire.documents import LayerConfig, LayerPage, LayerUpdate
from batchnorm_client.wire.errors import (
    InvalidRequest,
    LayerExists,
    TooManyLayers,
    VersionNotFound,
)

from ..engine import state, state_dict
from ..runtime import RUNTIME, Runtime
from ..store.base import Exists, Full, Store, StoreError
from ..telemetry import NoMetrics, Reporter
from ..telemetry.layers import LayerMetrics
from ..telemetry.metrics import RESIDENT_LAYERS, WAITING_CALLS
from . import records
from .batches import Batches, Read
from .cache import CacheEntry, LayerCache
from .cached_state import store_unavailable
from .compute import ComputeExecutor
from .drift_monitor import DriftMonitor
from .history import History
from .idempotency import IdempotencyToken, make_token
from .layer_states import LayerStates
from .records import CommittedLayer
from .results import LayersOptions, Snapshot
from .states import States
from .updates import Change, Deletion, Done, IfMatch, ReplacedError

P = ParamSpec("P")
R = TypeVar("R")


class Layers:
    """Named layers in a store. All methods raise `batchnorm_client.wire.errors.ProblemError` for invalid calls.

    Args:
        store: open.
        options: limits and defaults.
        runtime: clock, random numbers, tasks, threads.
        metrics: None if they are off.
        traced: whether stages are recorded as spans.

    Attributes:
        batches: the operations that take a batch or its moments.
        states: the states of several layers, and calls that wait for others.
        history: kept states and pins.
        drift: how far the batches are from what the layers know.
        decode, encode: call a function that reads a request or writes a response of about so many bytes: in a thread if
            they are many.
    """

    def __init__(
        self,
        store: Store,
        options: LayersOptions | None = None,
        runtime: Runtime = RUNTIME,
        metrics: Reporter | None = None,
        *,
        traced: bool = False,
    ) -> None:
        self._store = store
        self._runtime = runtime
        self._options = options or LayersOptions()
        self._executor = ComputeExecutor(self._options.device, self._options.inline_bytes, runtime, traced=traced)
        self.decode, self.encode = self._executor.decode, self._executor.encode
        self._cache = LayerCache(store, self._executor, self._options, runtime, LayerMetrics(metrics or NoMetrics()))
        self.drift: Final = DriftMonitor(
            store, self._cache, self._executor, self._options.drift, self._options.resident_layers, runtime
        )
        self._cache.observer = self.drift
        self.batches: Final = Batches(self._cache, self._executor, self.drift, runtime)
        self.history: Final = History(store, self._cache, self._executor, self._options, runtime)
        self.states: Final = States(store, self._cache, self._executor, self._options.waiting_calls, runtime)
        self._cache.changed = self.states.watches.changed
        if metrics:
            metrics.gauge(RESIDENT_LAYERS, self._cache.__len__)
            metrics.gauge(WAITING_CALLS, lambda: self.states.watches.waiting)

    async def open(self) -> None:
        """Check that the default device is available. Raises `DeviceUnavailable`."""
        self._executor.device(None)

    async def close(self) -> None:
        """Return when every queued update is committed or refused."""
        await self.states.watches.closed()
        await self._cache.drained()
        await self.drift.close()
        self._executor.close()

    async def ping(self) -> None:
        """Return when the store answers; raises `StoreUnavailable` when it does not."""
        with _store_errors():
            await self._store.ping()

    async def create(self, name: str, config: LayerConfig) -> tuple[Snapshot, bool]:
        """Create a layer, unless it exists; return it and whether it is new.

        Raises:
            LayerExists: it was created with another config.
            TooManyLayers: the store has as many layers as `max_layers` allows.
            InvalidRequest: it would have more features than `max_features` allows.
            DeviceUnavailable: the config's device is not available.
        """
        if config.num_features > self._options.max_features:
            raise InvalidRequest(
                f"num_features: at most {self._options.max_features}, see BATCHNORM_MAX_FEATURES",
                field="num_features",
                expected=self._options.max_features,
                got=config.num_features,
            )
        self._executor.device(config.device)
        data = records.encode_new(state.initial_state(config), records.now(self._runtime))
        try:
            with _store_errors():
                outcome = await self._store.create(name, data, self._options.max_layers)
        finally:  # it may have taken effect, whatever is raised
            self.states.watches.changed(name)
        if isinstance(outcome, Full):
            raise TooManyLayers(
                f"the store holds {self._options.max_layers} layers, as many as BATCHNORM_MAX_LAYERS allows",
                expected=self._options.max_layers,
            )
        if not isinstance(outcome, Exists):
            return await self._snapshot(name, records.decode(outcome)), True
        layer = records.decode(outcome.record)
        if layer.created_config != config:
            raise _layer_exists(name, layer.created_config, config)
        return await self._snapshot(name, layer), False

    async def get(self, name: str, at: int | str | None = None) -> Snapshot:
        """The layer's newest committed state, or that of a kept version or of a tag."""
        with self._cache.use(name) as entry:
            return await self._snapshot(name, await (entry.cached.fresh() if at is None else entry.kept.get(at)))

    async def snapshot(self, states: LayerStates) -> Snapshot:
        """The one layer of these states."""
        ((name, layer),) = states.layers.items()
        return await self._snapshot(name, layer)

    async def list(self, prefix: str, after: str, limit: int) -> LayerPage:
        """Up to `limit` layers whose names start with `prefix` and sort after `after`, by name."""
        with _store_errors():
            entries = await self._store.list(prefix, after, limit + 1)
        page = [records.summary(entry) for entry in entries[:limit]]
        return LayerPage(layers=page, next=page[-1].name if len(entries) > limit else None)

    async def update(self, name: str, update: LayerUpdate, if_match: IfMatch) -> Snapshot:
        """Set the given fields."""
        change = Change(
            make_token(self._runtime, None, ""),
            "update",
            lambda old: state.update(old, update),
            if_match,
            frequent=all(field in ("weight", "bias") for field, _ in update.given()),  # as an optimizer does
        )
        with self._cache.use(name) as entry:
            return (await self._result(name, await entry.queue.submit(change)))[0]

    async def reset(self, name: str, what: str, key: str | None, if_match: IfMatch) -> tuple[Snapshot, bool]:
        """Set tensors back to their initial values; return the layer, and whether the call was replayed by its key."""
        token = make_token(self._runtime, key, f"reset {what}")
        change = Change(token, records.RESET, lambda old: state.reset(old, what), if_match)
        with self._cache.use(name) as entry:
            return await self._result(name, await entry.queue.submit(change))

    async def rollback(self, name: str, to: int | str, key: str | None, if_match: IfMatch) -> tuple[Snapshot, bool]:
        """Commit a kept state as the newest one: its tensors, counters and config.

        Args:
            name: the layer.
            to: a kept version, or the tag of a pin.
            key: the call's Idempotency-Key.
            if_match: the precondition.

        Returns:
            The layer, and whether the call was replayed by its key.
        """
        token = make_token(self._runtime, key, f"rollback {to!r}")
        with self._cache.use(name) as entry:
            while True:
                with suppress(ReplacedError):  # deleted, and perhaps created again, since the state was read
                    return await self._result(name, await _roll_back(entry, token, to, if_match))

    async def replace_state(self, name: str, read: Read, if_match: IfMatch, *, nbytes: int = 0) -> Snapshot:
        """Replace the tensors that `read` returns. With large `nbytes`, the body's size, `read` runs in a thread."""
        return (await self._result(name, await self.states.replace(name, read, if_match, nbytes=nbytes)))[0]

    async def delete(self, name: str, if_match: IfMatch, *, with_pins: bool = False) -> None:
        """Remove the layer, its receipts and its history; one that has pins only if `with_pins`."""
        with self._cache.use(name) as entry:
            await entry.queue.submit(Deletion(if_match, with_pins))

    async def _result(self, name: str, done: Done) -> tuple[Snapshot, bool]:
        snapshot = await self._snapshot(name, done.layer)
        if done.replayed:
            snapshot = replace(snapshot, version=done.version, num_batches_tracked=done.batch)
        return snapshot, done.replayed

    async def _snapshot(self, name: str, layer: CommittedLayer) -> Snapshot:
        return Snapshot(
            name=name,
            version=layer.stamp.version,
            config=layer.state.config,
            created_at=layer.created_at,
            updated_at=layer.updated_at,
            num_batches_tracked=layer.state.num_batches_tracked,
            samples_tracked=layer.state.samples_tracked,
            tensors=state_dict.state_dict(layer.state),
            digest=await self._executor.digest(layer),
            tag=layer.stamp.tag,
        )


async def _roll_back(entry: CacheEntry, token: IdempotencyToken, to: int | str, if_match: IfMatch) -> Done:
    try:
        kept = await entry.kept.get(to, "version" if isinstance(to, int) else "tag")
    except VersionNotFound as error:
        newest = await entry.cached.fresh()
        return await entry.calls.replayed(token, newest.stamp.incarnation, error)
    return await entry.queue.submit(Change(token, "rollback", lambda _: kept.state, if_match, kept.stamp.incarnation))


def _layer_exists(name: str, existing: LayerConfig, config: LayerConfig) -> LayerExists:
    got = config.model_dump()
    expected = {field: value for field, value in existing.model_dump().items() if value != got[field]}
    differences = [f"{field} {json.dumps(value)}, not {json.dumps(got[field])}" for field, value in expected.items()]
    return LayerExists(
        f"layer {name!r} exists and was created with {' and '.join(differences)}",
        field="name",
        expected=expected,
        got={field: got[field] for field in expected},
    )


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise store_unavailable(error) from error
