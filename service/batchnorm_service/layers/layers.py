"""`Layers`: every call on named layers, for whatever protocol asks. HTTP is `api`'s business, arithmetic `engine`'s."""

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
from .idempotency import token
from .records import CommittedLayer
from .results import LayersOptions, Snapshot
from .updates import Change, Deletion, IfMatch, ReplacedError, check_version

P = ParamSpec("P")
R = TypeVar("R")


class Layers:
    """Named layers over a store. All methods raise `batchnorm_client.wire.errors.ProblemError` for what they refuse.

    Attributes:
        batches: the calls that bring a batch.
    """

    def __init__(self, store: Store, options: LayersOptions | None = None, runtime: Runtime = RUNTIME) -> None:
        self._store = store
        self._runtime = runtime
        self._options = options or LayersOptions()
        self._executor = ComputeExecutor(self._options.device, self._options.inline_bytes, runtime)
        self._cache = LayerCache(store, self._options, runtime)
        self.batches: Final = Batches(self._cache, self._executor, runtime)

    async def open(self) -> None:
        """Check that the default device is there. Raises `DeviceUnavailable`."""
        self._executor.device(None)

    async def close(self) -> None:
        """Return when every queued change has been committed and answered."""
        await self._cache.drained()
        self._executor.close()

    async def ping(self) -> None:
        """Return when the store answers; raises `StoreUnavailable` when it does not."""
        with _store_errors():
            await self._store.ping()

    async def run_codec(self, nbytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Read a request's body or write an answer, of about so many bytes: in a thread where they are many."""
        return await self._executor.run_codec(nbytes, function, *args, **kwargs)

    async def create(self, name: str, config: LayerConfig) -> tuple[Snapshot, bool]:
        """The layer of that name and whether this call made it.

        Raises:
            LayerExists: it was created with another config.
            TooManyLayers: the store holds as many layers as it may.
            DeviceUnavailable: the config names a device that is not there.
        """
        self._executor.device(config.device)
        made = records.now(self._runtime)
        data = records.encode(state.initial_state(config), config, made, made)
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
        """The layer as it is now."""
        with self._cache.use(name) as entry:
            return _snapshot(name, await entry.cached.fresh())

    async def list(self, prefix: str, after: str, limit: int) -> LayerPage:
        """Up to `limit` layers whose names start with `prefix` and follow `after`, by name."""
        with _store_errors():
            entries = await self._store.list(prefix, after, limit + 1)
        page = [records.summary(entry) for entry in entries[:limit]]
        return LayerPage(layers=page, next=page[-1].name if len(entries) > limit else None)

    async def update(self, name: str, update: LayerUpdate, if_match: IfMatch) -> Snapshot:
        """Set the given fields."""
        return (await self._change(name, lambda old: state.update(old, update), if_match))[0]

    async def reset(self, name: str, what: str, key: str | None, if_match: IfMatch) -> tuple[Snapshot, bool]:
        """Set tensors back to their initial values; the layer, and whether it had been done before under this key."""
        return await self._change(name, lambda old: state.reset(old, what), if_match, key, f"reset {what}")

    async def replace_state(self, name: str, read: Read, if_match: IfMatch, *, nbytes: int = 0) -> Snapshot:
        """Replace the tensors that `read` returns, in a thread where the body, `nbytes` long, is large."""
        with self._cache.use(name) as entry:
            while True:
                layer = await entry.cached.known()
                try:
                    tensors = await self._executor.run_codec(nbytes, read, state_dict.dtypes(layer.state))
                except ProblemError:
                    newest = await entry.cached.fresh()
                    check_version(if_match, newest)
                    if newest.stamp.incarnation != layer.stamp.incarnation:
                        continue  # it was read for a layer that is no more
                    raise
                replaced = partial(state_dict.replace_tensors, tensors=tensors)
                change = Change(token(self._runtime, None, ""), replaced, if_match, layer.stamp.incarnation)
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
            done = await entry.queue.submit(Change(token(self._runtime, key, operation), apply, if_match))
        snapshot = _snapshot(name, done.layer)
        if done.replayed:
            snapshot = replace(snapshot, version=done.version, num_batches_tracked=done.batch)
        return snapshot, done.replayed


def _layer_exists(name: str, made: LayerConfig, asked: LayerConfig) -> LayerExists:
    wanted = asked.model_dump()
    differ = {field: value for field, value in made.model_dump().items() if value != wanted[field]}
    told = [f"{field} {json.dumps(value)}, not {json.dumps(wanted[field])}" for field, value in differ.items()]
    return LayerExists(
        f"layer {name!r} exists and was created with {' and '.join(told)}",
        field="name",
        expected=differ,
        got={field: wanted[field] for field in differ},
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
