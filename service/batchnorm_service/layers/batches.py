"""Calls that bring a batch: train, moments, eval, inverse and backward, alone or as a shard of a synchronized batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import torch

from batchnorm_client.wire.errors import InvalidRequest, ProblemError, ShapeMismatch
from batchnorm_client.wire.tensors import Tensor, require

from ..engine import gradients, normalize
from ..engine.inverse import inverse_step
from ..engine.moments import Moments, no_extremes
from ..engine.posted import MOMENT_DTYPES, posted_moments
from ..engine.state import LayerState
from ..engine.tensors import to_wire
from .cache import Slot, Slots
from .cached_state import Resident, layer_not_found
from .compute import Computing
from .groups import GroupCall, Operation, Outcome
from .idempotency import Ticket, ticket
from .records import Held
from .results import Differentiated, Folded, Normalized
from .synchronized import FoldGroup, GradientGroup, Part
from .training import Posting, Training, normalized
from .updates import Done, Fold, ReplacedError, replay
from .work import BatchWork, PostedWork, Work

Read = Callable[[Mapping[str, str]], Mapping[str, Tensor]]
"""Reads the caller's tensors, once it is known which there may be and in which dtype JSON numbers are to be read."""

T = TypeVar("T")
W = TypeVar("W", bound=Work)
Prepare = Callable[[Held], Awaitable[tuple[W, Ticket]]]
"""Reads what a call brings, for a layer."""


class Batches:
    """Batches for named layers.

    `nbytes` of a call says how many bytes `read` has to look at: it is called in a thread where they are many.
    """

    def __init__(self, slots: Slots, computing: Computing) -> None:
        self._slots = slots
        self._computing = computing

    def at_once(self, nbytes: int) -> bool:
        """Whether a batch of so many bytes is computed without waiting for a thread."""
        return self._computing.at_once(nbytes)

    async def train(
        self,
        name: str,
        read: Read,
        key: str | None,
        *,
        nbytes: int = 0,
        statistics: bool = False,
        group: GroupCall | None = None,
    ) -> Normalized:
        """Normalize a batch with its own statistics and fold them into the running ones, exactly once per key.

        With a group, the batch is a shard: it is normalized with the statistics of all shards, which are folded once.
        """
        with self._slots.use(name) as slot:
            if group is not None:
                return await self._train_shard(slot, read, key, group, nbytes=nbytes, statistics=statistics)

            async def prepare(held: Held) -> tuple[BatchWork, Ticket]:
                wire = await self._computing.run_codec(nbytes, _input, read, held.state)
                claim = await self._ticket(key, "train", wire)
                return BatchWork(self._computing.batch(held.state, wire), self._computing), claim

            work, done = await self._fold(slot, prepare)
            return normalized(await work.output(done.held.state), done, statistics=statistics)

    def train_soon(self, name: str, read: Read, key: str | None) -> Training | None:
        """The same for a small batch and a layer that is here: all but the commit is done at once.

        None: something has to be waited for, or the call is refused. Nothing has happened then; `train` does it.
        """
        if (here := self._here(name)) is None:
            return None
        slot, held = here
        if self._computing.away(held.state):
            return None
        try:
            wire = _input(read, held.state)
            batch = self._computing.batch(held.state, wire)
            if not self._computing.at_once(batch.nbytes):
                return None
            work = BatchWork(batch, self._computing)
            work.under_now(held.state)
            fold = Fold(ticket(key, "train", wire), held.stamp.incarnation, work)
        except ProblemError:
            return None
        return Training(slot.queue.put(fold), work, lambda: self.train(name, read, key))

    async def fold_moments(
        self, name: str, read: Read, key: str | None, *, nbytes: int = 0, group: GroupCall | None = None
    ) -> Folded:
        """Fold the moments of a batch that stayed with the caller; as a shard of a group, those of all shards."""
        with self._slots.use(name) as slot:
            if group is not None:
                return await self._fold_shard_moments(slot, read, key, group, nbytes)

            async def prepare(held: Held) -> tuple[PostedWork, Ticket]:
                moments, claim = await self._computing.run_codec(nbytes, _posted, read, held.state, key, "moments")
                return PostedWork(moments), claim

            _, done = await self._fold(slot, prepare)
            return Folded(done.version, done.batch, done.replayed)

    def fold_moments_soon(self, name: str, read: Read, key: str | None) -> Posting | None:
        """The same for a layer that is here: all but the commit is done at once. None as in `train_soon`."""
        if (here := self._here(name)) is None:
            return None
        slot, held = here
        try:
            moments, tensors = posted_moments(held.state.config, read(MOMENT_DTYPES))
            work = PostedWork(moments)
            work.under_now(held.state)
            fold = Fold(ticket(key, "moments", *tensors), held.stamp.incarnation, work)
        except ProblemError:
            return None
        return Posting(slot.queue.put(fold), lambda: self.fold_moments(name, read, key))

    async def fold_many(
        self, moments: Mapping[str, Mapping[str, Tensor] | ProblemError], key: str | None
    ) -> dict[str, Folded | Exception]:
        """Fold moments into many layers, each all or nothing.

        Whatever stops one of them, a fault of ours too, is its result: the others may be folded already.

        Args:
            moments: by layer; a problem where they cannot be read, which is told unless there is a greater one.
            key: of the call; it counts for each layer by itself.
        """

        async def one(name: str, tensors: Mapping[str, Tensor] | ProblemError) -> Folded | Exception:
            def read(_: Mapping[str, str]) -> Mapping[str, Tensor]:
                if isinstance(tensors, ProblemError):
                    raise tensors
                return tensors

            nbytes = 0 if isinstance(tensors, ProblemError) else sum(tensor.nbytes for tensor in tensors.values())
            try:
                return await self.fold_moments(name, read, key, nbytes=nbytes)
            except Exception as error:
                return error

        return dict(zip(moments, await asyncio.gather(*(one(*item) for item in moments.items())), strict=True))

    async def eval(self, name: str, read: Read, *, nbytes: int = 0, statistics: bool = False) -> Normalized:
        """Normalize a batch with the running statistics. Changes nothing."""
        held = await self._fresh(name)
        batch = self._computing.batch(held.state, await self._computing.run_codec(nbytes, _input, read, held.state))
        output = await self._computing.run(batch.nbytes, normalize.eval_step, held.state, batch)
        named: dict[str, torch.Tensor] = {}
        if statistics:
            named = await self._computing.run(batch.nbytes, normalize.eval_statistics, held.state, batch)
        return _unchanged(held, output, named)

    def eval_now(self, name: str, read: Read) -> Normalized | None:
        """The same for a small batch and a layer whose newest state is here; otherwise None."""
        held = self._slots.certain(name)
        if held is None or self._computing.away(held.state):
            return None
        batch = self._computing.batch(held.state, _input(read, held.state))
        if not self._computing.at_once(batch.nbytes):
            return None
        return _unchanged(held, normalize.eval_step(held.state, batch), {})

    async def inverse(self, name: str, read: Read, *, nbytes: int = 0) -> Normalized:
        """Undo eval's normalization of a batch. Changes nothing."""
        held = await self._fresh(name)
        batch = self._computing.batch(held.state, await self._computing.run_codec(nbytes, _input, read, held.state))
        return _unchanged(held, await self._computing.run(batch.nbytes, inverse_step, held.state, batch), {})

    async def backward(
        self,
        name: str,
        read: Read,
        key: str | None,
        *,
        training: bool,
        nbytes: int = 0,
        group: GroupCall | None = None,
    ) -> Differentiated:
        """The gradients of a batch, or of a shard of a synchronized one. Changes nothing."""
        with self._slots.use(name) as slot:
            held = await slot.resident.fresh()
            layer = held.state
            wires = await self._computing.run_codec(nbytes, _batch_and_gradient, read, layer)
            batch, grad = (self._computing.batch(layer, wire) for wire in wires)
            size = batch.nbytes + grad.nbytes
            if group is None:
                done = await self._computing.run(
                    size, gradients.backward_step, layer, batch, grad, training=training
                )  # fmt: skip
                return _differentiated(held.stamp.version, done, replayed=False)
            if not training or layer.config.clip is not None:
                raise InvalidRequest(
                    "a group's backward is that of train mode, for a layer that does not clip",
                    field="group",
                    expected="mode=train and no clip",
                )
            sums = await self._computing.run(size, gradients.gradient_sums, layer, batch, grad)
            member = await self._ticket(key, f"backward {_name(group)}", *wires)
            outcome = await _joined(slot, group, member, sums, GradientGroup(held, slot.queue))
            done = await self._computing.run(size, gradients.shard_backward, layer, batch, grad, outcome.whole)
            return _differentiated(outcome.version, done, replayed=outcome.replayed)

    # ----------------------------------------------------------------------------------------------------- shards

    async def _train_shard(
        self, slot: Slot, read: Read, key: str | None, group: GroupCall, *, nbytes: int, statistics: bool
    ) -> Normalized:
        held = await slot.resident.fresh()
        wire = await self._computing.run_codec(nbytes, _input, read, held.state)
        batch, member = self._computing.batch(held.state, wire), await self._ticket(key, f"train {_name(group)}", wire)
        part = Part(*await self._computing.run(batch.nbytes, normalize.shard_moments, held.state, batch))
        outcome = await _joined(slot, group, member, part, FoldGroup(held, slot.queue))
        whole = outcome.whole
        assert whole.frozen is not None  # noqa: S101 - what closing a group writes
        step = await self._computing.run(
            batch.nbytes, normalize.normalize_with, held.state, whole.frozen, batch, whole.moments
        )
        named = normalize.named_statistics(step) if statistics else {}
        return Normalized(to_wire(step.output), outcome.version, outcome.batch, outcome.replayed, _to_wire(named))

    async def _fold_shard_moments(
        self, slot: Slot, read: Read, key: str | None, group: GroupCall, nbytes: int
    ) -> Folded:
        held = await slot.resident.fresh()
        operation = f"moments {_name(group)}"
        moments, member = await self._computing.run_codec(nbytes, _posted, read, held.state, key, operation, least=0)
        part = Part(moments, no_extremes(held.state.config.num_features))
        outcome = await _joined(slot, group, member, part, FoldGroup(held, slot.queue))
        whole = outcome.whole.moments
        return Folded(outcome.version, outcome.batch, outcome.replayed, whole.count, _to_wire(_moments(whole)))

    # ---------------------------------------------------------------------------------------------------- helpers

    async def _ticket(self, key: str | None, operation: str, *tensors: Tensor) -> Ticket:
        """Taking the fingerprint of a large batch takes long; without a key none is taken."""
        nbytes = 0 if key is None else sum(tensor.nbytes for tensor in tensors)
        return await self._computing.run_codec(nbytes, ticket, key, operation, *tensors)

    def _here(self, name: str) -> tuple[Slot, Held] | None:
        """A layer that is in memory and takes a fold at once."""
        slot = self._slots.get(name)
        if slot is None or (held := slot.resident.held) is None or not held.state.tracks or slot.queue.full:
            return None
        return slot, held

    async def _fresh(self, name: str) -> Held:
        if (held := self._slots.certain(name)) is not None:
            return held
        with self._slots.use(name) as slot:
            return await slot.resident.fresh()

    async def _fold(self, slot: Slot, prepare: Prepare[W]) -> tuple[W, Done]:
        while True:
            held, work, claim = await _prepared(slot.resident, prepare)
            try:
                await work.under(held.state)
            except ProblemError as error:
                newest = await slot.resident.fresh()
                if newest.stamp.incarnation != held.stamp.incarnation or not newest.state.normalizes_like(held.state):
                    continue  # it was judged by a layer that has changed since
                try:
                    return work, await _repeated(slot, newest, claim, error)
                except ReplacedError:
                    continue
            if not (claim.from_caller or held.state.tracks):  # nothing to commit, and `held` is fresh
                batches = held.state.num_batches_tracked
                return work, Done(held, held.stamp.version, batches, replayed=False)
            try:
                return work, await slot.queue.submit(Fold(claim, held.stamp.incarnation, work))
            except ReplacedError:
                continue  # the layer that has this name now decides what becomes of the batch


async def _joined(slot: Slot, group: GroupCall, member: Ticket, part: T, operation: Operation[T]) -> Outcome[T]:
    try:
        return await slot.groups.join(group, member, part, operation)
    except ReplacedError:
        raise layer_not_found(slot.resident.name) from None  # the group was of a layer that is no more


async def _prepared(resident: Resident, prepare: Prepare[W]) -> tuple[Held, W, Ticket]:
    """What a call brings, read for a committed state, and for the newest before it is refused or goes uncommitted."""
    held = await resident.known()
    if not held.state.tracks:
        held = await resident.fresh()
    try:
        return held, *await prepare(held)
    except ProblemError:
        newest = await resident.fresh()
        if newest.stamp == held.stamp:
            raise
    return newest, *await prepare(newest)


async def _repeated(slot: Slot, newest: Held, claim: Ticket, error: ProblemError) -> Done:
    """The answer to a repeat of a batch that the layer would refuse now; the error when it is no repeat."""
    receipt = await slot.queue.find(claim, newest.stamp.incarnation) if claim.from_caller else None
    done = error if receipt is None else replay(claim, await slot.resident.fresh(), receipt)
    if isinstance(done, ProblemError):
        raise done
    return done


def _input(read: Read, layer: LayerState) -> Tensor:
    (tensor,) = require(read({"input": layer.config.dtype}), "input")
    if tensor.shape == (0,):  # all that JSON can say of a batch without rows
        tensor = Tensor(tensor.dtype, normalize.empty_shape(layer.config), tensor.buffer)
    normalize.check_input(layer.config, tensor)
    return tensor


def _posted(
    read: Read, layer: LayerState, key: str | None, operation: str, *, least: int | None = None
) -> tuple[Moments, Ticket]:
    moments, tensors = posted_moments(layer.config, read(MOMENT_DTYPES), least=least)
    return moments, ticket(key, operation, *tensors)


def _batch_and_gradient(read: Read, layer: LayerState) -> tuple[Tensor, Tensor]:
    names = ("input", "grad_output")
    batch, grad = require(read(dict.fromkeys(names, layer.config.dtype)), *names)
    normalize.check_input(layer.config, batch)
    normalize.check_input(layer.config, grad, "grad_output")
    if (batch.shape, batch.dtype) != (grad.shape, grad.dtype):
        raise ShapeMismatch(
            f"grad_output must be as input, {batch.dtype} {batch.shape}, got {grad.dtype} {grad.shape}",
            field="grad_output",
            expected=list(batch.shape),
            got=list(grad.shape),
        )
    return batch, grad


def _name(group: GroupCall) -> str:
    return f"{group.id} {group.size}"


def _moments(whole: Moments) -> dict[str, torch.Tensor]:
    return {"mean": whole.mean, "var": whole.biased_var()}


def _unchanged(held: Held, output: torch.Tensor, named: Mapping[str, torch.Tensor]) -> Normalized:
    version, batches = held.stamp.version, held.state.num_batches_tracked
    return Normalized(to_wire(output), version, batches, statistics=_to_wire(named))


def _differentiated(version: int, done: gradients.Gradients, *, replayed: bool) -> Differentiated:
    named = {name: tensor for name, tensor in done._asdict().items() if tensor is not None}
    return Differentiated(_to_wire(named), version, replayed)


def _to_wire(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    return {name: to_wire(tensor) for name, tensor in tensors.items()}
