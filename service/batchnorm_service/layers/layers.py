"""`Layers`: every call on named layers, for whatever protocol asks. HTTP is `api`'s business, arithmetic `engine`'s."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import ParamSpec, TypeVar

import torch

from batchnorm_client.contract import LayerConfig, LayerPage, LayerUpdate
from batchnorm_client.errors import (
    InvalidRequest,
    LayerExists,
    ProblemError,
    StoreUnavailable,
    TooManyLayers,
)
from batchnorm_client.tensors import Tensor

from ..engine import normalize, state, state_dict
from ..engine.devices import device
from ..engine.tensors import to_torch, to_wire
from ..store.base import Exists, Full, Store, StoreError
from . import records
from .changes import Change, Deletion, Done, Fold, IfMatch, ReplacedError
from .queue import Queue
from .receipts import ticket
from .records import Held
from .resident import Resident
from .results import LayersOptions, Normalized, Snapshot

P = ParamSpec("P")
R = TypeVar("R")
Read = Callable[[Mapping[str, str]], Mapping[str, Tensor]]
"""Reads the caller's tensors, once it is known which there may be and in which dtype JSON numbers are to be read."""


class _Slot:
    """A resident layer with its queue, and how many calls are using them."""

    def __init__(self, name: str, store: Store, options: LayersOptions) -> None:
        self.resident = Resident(name, store)
        self.queue = Queue(self.resident, store, options.queue_length, options.store_timeout)
        self.users = 0

    @property
    def idle(self) -> bool:
        return self.users == 0 and self.queue.idle and self.resident.idle


class Layers:
    """Named layers over a store. All methods raise `batchnorm_client.errors.ProblemError` for what they refuse."""

    def __init__(self, store: Store, options: LayersOptions | None = None) -> None:
        self._store = store
        self._options = options or LayersOptions()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="batchnorm-compute")

    async def open(self) -> None:
        """Check that the default device is there. Raises `DeviceUnavailable`."""
        device(self._options.device)

    async def close(self) -> None:
        """Return when every queued change has been committed and answered."""
        for slot in list(self._slots.values()):
            await slot.queue.drained()
        self._pool.shutdown()

    async def ping(self) -> None:
        """Return when the store answers; raises `StoreUnavailable` when it does not."""
        with _store_errors():
            await self._store.ping()

    # ----------------------------------------------------------------------------------------- layers and states

    async def create(self, name: str, config: LayerConfig) -> tuple[Snapshot, bool]:
        """The layer of that name and whether this call made it.

        Raises:
            LayerExists: it was created with another config.
            TooManyLayers: the store holds as many layers as it may.
            DeviceUnavailable: the config names a device that is not there.
        """
        device(config.device or self._options.device)
        made = records.now()
        data = records.encode(state.initial_state(config), config, made, made)
        with _store_errors():
            outcome = await self._store.create(name, data, self._options.max_layers)
        if isinstance(outcome, Full):
            raise TooManyLayers(
                f"the store holds {self._options.max_layers} layers, as many as it may",
                expected=self._options.max_layers,
            )
        if not isinstance(outcome, Exists):
            return _snapshot(name, records.decode(outcome)), True
        held = records.decode(outcome.record)
        if held.created_config != config:
            raise LayerExists(
                f"layer {name!r} exists and was created with another config",
                field="name",
                expected=held.created_config.model_dump(),
                got=config.model_dump(),
            )
        return _snapshot(name, held), False

    async def get(self, name: str) -> Snapshot:
        """The layer as it is now."""
        with self._use(name) as slot:
            return _snapshot(name, await slot.resident.fresh())

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

    async def replace_state(self, name: str, read: Read, if_match: IfMatch) -> Snapshot:
        """Replace the tensors that `read` returns."""

        def replaced(old: state.LayerState) -> state.LayerState:
            return state_dict.replace_tensors(old, read(state_dict.dtypes(old)))

        return (await self._change(name, replaced, if_match))[0]

    async def delete(self, name: str, if_match: IfMatch) -> None:
        """Remove the layer and its receipts."""
        with self._use(name) as slot:
            await slot.queue.submit(Deletion(if_match))

    # --------------------------------------------------------------------------------------------------- batches

    async def train(self, name: str, read: Read, key: str | None, *, statistics: bool = False) -> Normalized:
        """Normalize a batch with its own statistics and fold them into the running ones, exactly once per key."""
        with self._use(name) as slot:
            while True:
                held, fold = await self._prepare(slot.resident, read, key)
                if fold.ticket.from_caller or held.state.tracks:
                    try:
                        done = await slot.queue.submit(fold)
                    except ReplacedError:
                        continue  # the layer that has this name now decides what becomes of the batch
                else:  # nothing to commit, and `held` is fresh
                    done = Done(held, held.stamp.version, held.state.num_batches_tracked, replayed=False)
                step = fold.step
                if not done.held.state.normalizes_like(fold.basis):  # a repeat, after weight, bias or config changed
                    step = await fold.compute(done.held.state)
                named = normalize.named_statistics(step) if statistics else {}
                return Normalized(to_wire(step.output), done.version, done.batch, done.replayed, _to_wire(named))

    async def eval(self, name: str, read: Read, *, statistics: bool = False) -> Normalized:
        """Normalize a batch with the running statistics. Changes nothing."""
        with self._use(name) as slot:
            held = await slot.resident.fresh()
        batch = self._batch(held.state, read)
        output = await self._compute(batch, normalize.eval_step, held.state, batch)
        named = await self._compute(batch, normalize.eval_statistics, held.state, batch) if statistics else {}
        return Normalized(
            to_wire(output), held.stamp.version, held.state.num_batches_tracked, statistics=_to_wire(named)
        )

    async def _prepare(self, resident: Resident, read: Read, key: str | None) -> tuple[Held, Fold]:
        """Compute the batch under a committed state, and under the newest before it is refused or goes uncommitted."""
        held = await resident.known()
        if not held.state.tracks:
            held = await resident.fresh()
        try:
            return held, await self._fold(held, read, key)
        except ProblemError:
            newest = await resident.fresh()
            if newest.stamp == held.stamp:
                raise
        return newest, await self._fold(newest, read, key)

    async def _fold(self, held: Held, read: Read, key: str | None) -> Fold:
        wire = _input(held.state, read)
        batch = to_torch(wire).to(self._device(held.state))

        async def compute(basis: state.LayerState) -> normalize.TrainStep:
            return await self._compute(batch, normalize.train_step, basis, batch)

        return Fold(
            ticket=ticket(key, "train", wire),
            incarnation=held.stamp.incarnation,
            basis=held.state,
            step=await compute(held.state),
            compute=compute,
        )

    # ----------------------------------------------------------------------------------------------------- helpers

    async def _change(
        self,
        name: str,
        apply: Callable[[state.LayerState], state.LayerState],
        if_match: IfMatch,
        key: str | None = None,
        operation: str = "",
    ) -> tuple[Snapshot, bool]:
        with self._use(name) as slot:
            done = await slot.queue.submit(Change(ticket(key, operation), apply, if_match))
        snapshot = _snapshot(name, done.held)
        if done.replayed:
            snapshot = replace(snapshot, version=done.version, num_batches_tracked=done.batch)
        return snapshot, done.replayed

    def _batch(self, layer: state.LayerState, read: Read) -> torch.Tensor:
        return to_torch(_input(layer, read)).to(self._device(layer))

    def _device(self, layer: state.LayerState) -> torch.device:
        return device(layer.config.device or self._options.device)

    async def _compute(self, batch: torch.Tensor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Small batches at once, large ones in a thread (torch lets go of the GIL) so that other calls go on."""
        if batch.nbytes <= self._options.inline_bytes:
            return function(*args, **kwargs)
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    @contextmanager
    def _use(self, name: str) -> Iterator[_Slot]:
        """The slot of a layer, kept resident while it is used: its queue must not exist twice."""
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = _Slot(name, self._store, self._options)
            self._evict()
        else:
            self._slots.move_to_end(name)
        slot.users += 1
        try:
            yield slot
        finally:
            slot.users -= 1
            if slot.resident.held is None and slot.idle:  # a name that no layer has takes no room
                self._slots.pop(name, None)

    def _evict(self) -> None:
        """Let go of the layers that were used longest ago, but of none in use."""
        surplus = len(self._slots) - self._options.resident_layers
        if surplus > 0:
            idle = (name for name, slot in self._slots.items() if slot.idle)
            for name in list(islice(idle, surplus)):
                del self._slots[name]


def _input(layer: state.LayerState, read: Read) -> Tensor:
    tensors = read({"input": layer.config.dtype})
    if "input" not in tensors:
        raise InvalidRequest("the tensor input is missing", field="input", expected="a tensor named input", got=None)
    normalize.check_input(layer.config, tensors["input"])
    return tensors["input"]


def _to_wire(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    return {name: to_wire(tensor) for name, tensor in tensors.items()}


def _snapshot(name: str, held: Held) -> Snapshot:
    return Snapshot(
        name=name,
        version=held.stamp.version,
        config=held.state.config,
        created_at=held.created_at,
        updated_at=held.updated_at,
        num_batches_tracked=held.state.num_batches_tracked,
        samples_tracked=held.state.samples_tracked,
        tensors=state_dict.state_dict(held.state),
    )


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise StoreUnavailable(f"the store does not answer: {error}", retry_after=1) from error
