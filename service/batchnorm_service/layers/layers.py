"""`Layers`: all operations on named layers, independent of the protocol that calls them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Final, ParamSpec, TypeVar

from batchnorm_client.wire.documents import LayerConfig, LayerPage, LayerUpdate
from batchnorm_client.wire.errors import LayerExists, ProblemError, StoreUnavailable, TooManyLayers

from ..engine import state, state_dict
from ..runtime import RUNTIME, Runtime
from ..store.base import Exists, Full, Store, StoreError
from . import records
from .batches import Batches, Read
from .cache import LayerCache
from .compute import ComputeExecutor
from .idempotency import make_token
from .records import CommittedLayer
from .results import LayersOptions, Snapshot
from .updates import Change, Deletion, IfMatch, ReplacedError, check_version

P = ParamSpec("P")
R = TypeVar("R")


class Layers:
    """Named layers in a store. All methods raise `batchnorm_client.wire.errors.ProblemError` for invalid calls.

    Attributes:
        batches: the operations that take a batch or its moments.
    """

    def __init__(self, store: Store, options: LayersOptions | None = None, runtime: Runtime = RUNTIME) -> None:
        self._store = store
        self._runtime = runtime
        self._options = options or LayersOptions()
        self._executor = ComputeExecutor(self._options.device, self._options.inline_bytes, runtime)
        self._cache = LayerCache(store, self._options, runtime)
        self.batches: Final = Batches(self._cache, self._executor, runtime)

    async def open(self) -> None:
        """Check that the default device is available. Raises `DeviceUnavailable`."""
        self._executor.device(None)

    async def close(self) -> None:
        """Return when every queued update is committed or refused."""
        await self._cache.drained()
        self._executor.close()

    async def ping(self) -> None:
        """Return when the store answers; raises `StoreUnavailable` when it does not."""
        with _store_errors():
            await self._store.ping()

    async def run_codec(self, nbytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Decode a request or encode a response of about `nbytes` bytes: in a thread if they are many."""
        return await self._executor.run_codec(nbytes, function, *args, **kwargs)

    async def create(self, name: str, config: LayerConfig) -> tuple[Snapshot, bool]:
        """Create a layer, unless it exists; return it and whether it is new.

        Raises:
            LayerExists: it was created with another config.
            TooManyLayers: the store has as many layers as `max_layers` allows.
            DeviceUnavailable: the config's device is not available.
        """
        self._executor.device(config.device)
        now = records.now(self._runtime)
        data = records.encode(state.initial_state(config), config, now, now)
        with _store_errors():
            outcome = await self._store.create(name, data, self._options.max_layers)
        if isinstance(outcome, Full):
            raise TooManyLayers(
                f"the store holds {self._options.max_layers} layers, as many as BATCHNORM_MAX_LAYERS allows",
                expected=self._options.max_layers,
            )
        if not isinstance(outcome, Exists):
            return _snapshot(name, records.decode(outcome)), True
        layer = records.decode(outcome.record)
        if layer.created_config != config:
            raise _layer_exists(name, layer.created_config, config)
        return _snapshot(name, layer), False

    async def get(self, name: str) -> Snapshot:
        """The layer's newest committed state."""
        with self._cache.use(name) as entry:
            return _snapshot(name, await entry.cached.fresh())

    async def list(self, prefix: str, after: str, limit: int) -> LayerPage:
        """Up to `limit` layers whose names start with `prefix` and sort after `after`, by name."""
        with _store_errors():
            entries = await self._store.list(prefix, after, limit + 1)
        page = [records.summary(entry) for entry in entries[:limit]]
        return LayerPage(layers=page, next=page[-1].name if len(entries) > limit else None)

    async def update(self, name: str, update: LayerUpdate, if_match: IfMatch) -> Snapshot:
        """Set the given fields."""
        return (await self._change(name, lambda old: state.update(old, update), if_match))[0]

    async def reset(self, name: str, what: str, key: str | None, if_match: IfMatch) -> tuple[Snapshot, bool]:
        """Set tensors back to their initial values; return the layer, and whether the call was replayed by its key."""
        return await self._change(name, lambda old: state.reset(old, what), if_match, key, f"reset {what}")

    async def replace_state(self, name: str, read: Read, if_match: IfMatch, *, nbytes: int = 0) -> Snapshot:
        """Replace the tensors that `read` returns. With large `nbytes`, the body's size, `read` runs in a thread."""
        with self._cache.use(name) as entry:
            while True:
                layer = await entry.cached.latest_known()
                try:
                    tensors = await self._executor.run_codec(nbytes, read, state_dict.dtypes(layer.state))
                except ProblemError:
                    newest = await entry.cached.fresh()
                    check_version(if_match, newest)
                    if newest.stamp.incarnation != layer.stamp.incarnation:
                        continue  # decoded for a layer that was deleted
                    raise
                replaced = partial(state_dict.replace_tensors, tensors=tensors)
                change = Change(make_token(self._runtime, None, ""), replaced, if_match, layer.stamp.incarnation)
                with suppress(ReplacedError):
                    return _snapshot(name, (await entry.queue.submit(change)).layer)

    async def delete(self, name: str, if_match: IfMatch) -> None:
        """Remove the layer and its receipts."""
        with self._cache.use(name) as entry:
            await entry.queue.submit(Deletion(if_match))

    async def _change(
        self,
        name: str,
        apply: Callable[[state.LayerState], state.LayerState],
        if_match: IfMatch,
        key: str | None = None,
        operation: str = "",
    ) -> tuple[Snapshot, bool]:
        with self._cache.use(name) as entry:
            done = await entry.queue.submit(Change(make_token(self._runtime, key, operation), apply, if_match))
        snapshot = _snapshot(name, done.layer)
        if done.replayed:
            snapshot = replace(snapshot, version=done.version, num_batches_tracked=done.batch)
        return snapshot, done.replayed


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


def _snapshot(name: str, layer: CommittedLayer) -> Snapshot:
    return Snapshot(
        name=name,
        version=layer.stamp.version,
        config=layer.state.config,
        created_at=layer.created_at,
        updated_at=layer.updated_at,
        num_batches_tracked=layer.state.num_batches_tracked,
        samples_tracked=layer.state.samples_tracked,
        tensors=state_dict.state_dict(layer.state),
    )


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise StoreUnavailable(f"the store does not answer: {error}", retry_after=1) from error
