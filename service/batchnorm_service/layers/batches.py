"""Operations on batches: train, moments, eval, inverse and backward, also on shards of synchronized batches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import torch

from batchnorm_client.wire.errors import DigestMismatch, InvalidRequest, ProblemError, ShapeMismatch
from batchnorm_client.wire.tensors import Tensor, require

from ..engine import gradients, normalize
from ..engine.inverse import inverse_step
from ..engine.moments import Moments, empty_extremes
from ..engine.moments_stack import MomentsStack
from ..engine.normalize import TrainStep
from ..engine.posted import MOMENT_DTYPES, Posted, posted_moments, posted_shard
from ..engine.state import LayerState
from ..engine.tensors import to_wire
from ..runtime import Runtime
from .cache import CacheEntry, LayerCache
from .cached_state import CachedState, layer_not_found
from .compute import ComputeExecutor
from .drift_monitor import DriftMonitor
from .groups import GroupCall, Operation, Outcome
from .idempotency import IdempotencyToken, make_token
from .moments_source import BatchSource, MomentsSource, ObservedSource, PostedSource
from .records import CommittedLayer
from .results import Differentiated, Folded, Normalized
from .synchronized import FoldGroup, GradientGroup, Part
from .updates import Done, Fold, ReplacedError

Read = Callable[[Mapping[str, str]], Mapping[str, Tensor]]
"""Decodes the caller's tensors, given the names it may use and the dtype that JSON numbers get for each."""

T = TypeVar("T")
W = TypeVar("W", bound=MomentsSource)
Prepare = Callable[[CommittedLayer], Awaitable[tuple[W, IdempotencyToken]]]
"""Decodes a call's input for a state of the layer: the source of its moments, and its idempotency token."""


class Batches:
    """Operations that take a batch, or its moments, for a named layer.

    The argument `nbytes` is how many bytes `read` has to process: with many, it runs in a thread.
    """

    def __init__(self, cache: LayerCache, executor: ComputeExecutor, drift: DriftMonitor, runtime: Runtime) -> None:
        self._drift = drift
        self._runtime = runtime
        self._cache = cache
        self._executor = executor

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

        With `group`, the batch is a shard: it is normalized with the statistics of all shards, which are folded once.
        """
        with self._cache.use(name) as entry:
            if group is not None:
                return await self._train_shard(entry, read, key, group, nbytes=nbytes, statistics=statistics)

            async def prepare(layer: CommittedLayer) -> tuple[BatchSource, IdempotencyToken]:
                wire = await self._executor.decode(nbytes, _input, read, layer.state)
                token = await self._token(key, "train", wire)
                return BatchSource(self._executor.batch(layer.state, wire), self._executor), token

            source, done = await self._fold(entry, prepare)
            return _normalized(await source.output(done.layer.state), done, statistics=statistics)

    async def observe(
        self, name: str, read: Read, key: str | None, *, nbytes: int = 0, statistics: bool = False
    ) -> Normalized:
        """Fold a batch as `train` does, then normalize it with the running statistics right after its own fold.

        A replay is normalized with the newest ones. The layer must track running statistics.
        """
        with self._cache.use(name) as entry:

            async def prepare(layer: CommittedLayer) -> tuple[ObservedSource, IdempotencyToken]:
                wire = await self._executor.decode(nbytes, _input, read, layer.state)
                token = await self._token(key, "train normalize=running", wire)
                return ObservedSource(self._executor.batch(layer.state, wire), self._executor), token

            source, done = await self._fold(entry, prepare)
            state = done.layer.state if done.replayed else source.after
            output, named = await self._evaluated(state, source.batch, statistics=statistics)
            return Normalized(to_wire(output), done.version, done.batch, done.replayed, _to_wire(named))

    async def fold_moments(
        self, name: str, read: Read, key: str | None, *, nbytes: int = 0, group: GroupCall | None = None
    ) -> Folded:
        """Fold the moments of a batch that the caller keeps, or of a stack of batches, in their order and all or none.

        With `group`, those of all shards are folded once.
        """
        with self._cache.use(name) as entry:
            if group is not None:
                return await self._fold_shard_moments(entry, read, key, group, nbytes)

            async def prepare(layer: CommittedLayer) -> tuple[PostedSource, IdempotencyToken]:
                moments, token = await self._executor.decode(nbytes, _posted, self._runtime, read, layer.state, key)
                return PostedSource(moments, self._executor), token

            source, done = await self._fold(entry, prepare)
            rows = source.moments.batches if isinstance(source.moments, MomentsStack) else None
            return Folded(done.version, done.batch, done.replayed, rows)

    async def fold_many(
        self, moments: Mapping[str, Mapping[str, Tensor] | ProblemError], key: str | None
    ) -> dict[str, Folded | Exception]:
        """Fold moments into many layers; atomic per layer, not over all.

        An exception while folding into one layer, of any type, becomes that layer's result: others may be committed.

        Args:
            moments: by layer; or the problem with decoding them, unless folding raises another one first.
            key: the call's Idempotency-Key, applied to each layer separately.
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

    async def eval(
        self,
        name: str,
        read: Read,
        *,
        nbytes: int = 0,
        statistics: bool = False,
        at: int | str | None = None,
        expect: str | None = None,
    ) -> Normalized:
        """Normalize a batch with the running statistics. Does not change the layer.

        With `at`, those of a kept version or of a tag. With `expect`, only if the state has that digest.
        """
        layer = await self._state(name, at, expect)
        batch = self._executor.batch(layer.state, await self._executor.decode(nbytes, _input, read, layer.state))
        output, named = await self._evaluated(layer.state, batch, statistics=statistics)
        self._drift.evaluated(name, layer, batch, kept=at is not None)
        return _unchanged(layer, output, named)

    async def inverse(
        self, name: str, read: Read, *, nbytes: int = 0, at: int | str | None = None, expect: str | None = None
    ) -> Normalized:
        """Undo eval's normalization of a batch, with the same `at` and `expect`. Does not change the layer."""
        layer = await self._state(name, at, expect)
        batch = self._executor.batch(layer.state, await self._executor.decode(nbytes, _input, read, layer.state))
        return _unchanged(layer, await self._executor.run(batch.nbytes, inverse_step, layer.state, batch), {})

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
        """The gradients of a batch, or of a shard of a synchronized one. Does not change the layer."""
        with self._cache.use(name) as entry:
            layer = await entry.cached.fresh()
            state = layer.state
            tensors = await self._executor.decode(nbytes, _batch_and_gradient, read, state)
            batch, grad = (self._executor.batch(state, tensor) for tensor in tensors)
            size = batch.nbytes + grad.nbytes
            if group is None:
                done = await self._executor.run(
                    size, gradients.backward_step, state, batch, grad, training=training
                )  # fmt: skip
                return _differentiated(layer.stamp.version, done, replayed=False)
            if not training or state.config.clip is not None:
                raise InvalidRequest(
                    "a group's backward is that of train mode, for a layer that does not clip",
                    field="group",
                    expected="mode=train and no clip",
                )
            sums = await self._executor.run(size, gradients.gradient_sums, state, batch, grad)
            member = await self._token(key, f"backward {_name(group)}", *tensors)
            outcome = await _joined(entry, group, member, sums, GradientGroup(layer, entry.queue))
            done = await self._executor.run(size, gradients.shard_backward, state, batch, grad, outcome.whole)
            return _differentiated(outcome.version, done, replayed=outcome.replayed)

    async def _train_shard(
        self, entry: CacheEntry, read: Read, key: str | None, group: GroupCall, *, nbytes: int, statistics: bool
    ) -> Normalized:
        layer = await entry.cached.fresh()
        wire = await self._executor.decode(nbytes, _input, read, layer.state)
        batch, member = self._executor.batch(layer.state, wire), await self._token(key, f"train {_name(group)}", wire)
        part = Part(*await self._executor.run(batch.nbytes, normalize.shard_moments, layer.state, batch))
        outcome = await _joined(entry, group, member, part, FoldGroup(layer, entry.queue))
        whole = outcome.whole
        assert whole.parameters is not None  # noqa: S101 - `FoldGroup.close` sets it
        step = await self._executor.run(
            batch.nbytes, normalize.normalize_with, layer.state, whole.parameters, batch, whole.moments
        )
        named = normalize.named_statistics(step) if statistics else {}
        return Normalized(to_wire(step.output), outcome.version, outcome.batch, outcome.replayed, _to_wire(named))

    async def _fold_shard_moments(
        self, entry: CacheEntry, read: Read, key: str | None, group: GroupCall, nbytes: int
    ) -> Folded:
        layer = await entry.cached.fresh()
        operation = f"moments {_name(group)}"
        moments, member = await self._executor.decode(
            nbytes, _posted_shard, self._runtime, read, layer.state, key, operation
        )
        part = Part(moments, empty_extremes(layer.state.config.num_features))
        outcome = await _joined(entry, group, member, part, FoldGroup(layer, entry.queue))
        whole = outcome.whole.moments
        return Folded(
            outcome.version, outcome.batch, outcome.replayed, count=whole.count, moments=_to_wire(_moments(whole))
        )

    async def _evaluated(
        self, state: LayerState, batch: torch.Tensor, *, statistics: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A batch normalized with the running statistics, and these, if they are asked for."""
        output = await self._executor.run(batch.nbytes, normalize.eval_step, state, batch)
        if not statistics:
            return output, {}
        return output, await self._executor.run(batch.nbytes, normalize.eval_statistics, state, batch)

    async def _token(self, key: str | None, operation: str, *tensors: Tensor) -> IdempotencyToken:
        """The idempotency token of a call; with a key, the fingerprint of a large batch is computed in a thread."""
        nbytes = 0 if key is None else sum(tensor.nbytes for tensor in tensors)
        return await self._executor.run_codec(nbytes, make_token, self._runtime, key, operation, *tensors)

    async def _state(self, name: str, at: int | str | None, expect: str | None) -> CommittedLayer:
        """The newest committed state, or a kept one. Its digest is known then.

        Raises:
            LayerNotFound: there is no such layer.
            VersionNotFound: the state is not kept.
            DigestMismatch: its digest is not `expect`.
            StoreUnavailable: the store does not answer.
        """
        layer = self._cache.trusted(name) if at is None else None
        if layer is None:
            with self._cache.use(name) as entry:
                layer = await (entry.cached.fresh() if at is None else entry.kept.get(at))
        digest = await self._executor.digest(layer)
        if expect not in (None, digest):
            raise DigestMismatch(
                f"version {layer.stamp.version} of layer {name!r} has another digest",
                field="expect",
                expected=digest,
                got=expect,
            )
        return layer

    async def _fold(self, entry: CacheEntry, prepare: Prepare[W]) -> tuple[W, Done]:
        while True:
            layer, source, token = await _prepared(entry.cached, prepare)
            try:
                await source.compute(layer.state)
            except ProblemError as error:
                newest = await entry.cached.fresh()
                if newest.stamp.incarnation != layer.stamp.incarnation or not newest.state.normalizes_like(layer.state):
                    continue  # refused by an outdated state: try with the newest
                try:
                    return source, await entry.calls.replayed(token, newest.stamp.incarnation, error)
                except ReplacedError:
                    continue
            if not (token.from_caller or layer.state.tracks):  # nothing to commit, and `_prepared` loaded a fresh state
                self._drift.folded(entry.cached.name, layer, [source.moments])
                batches = layer.state.num_batches_tracked
                return source, Done(layer, layer.stamp.version, batches, replayed=False)
            try:
                return source, await entry.queue.submit(Fold(token, layer.stamp.incarnation, source))
            except ReplacedError:
                continue  # prepare the batch for the layer that has this name now


async def _joined(
    entry: CacheEntry, group: GroupCall, member: IdempotencyToken, part: T, operation: Operation[T]
) -> Outcome[T]:
    try:
        return await entry.groups.join(group, member, part, operation)
    except ReplacedError:
        raise layer_not_found(entry.cached.name) from None  # the group's layer was deleted


async def _prepared(cached: CachedState, prepare: Prepare[W]) -> tuple[CommittedLayer, W, IdempotencyToken]:
    """A call's input, decoded for a committed state; for the newest one if it is refused or will not be committed."""
    layer = await cached.latest_known()
    if not layer.state.tracks:
        layer = await cached.fresh()
    try:
        return layer, *await prepare(layer)
    except ProblemError:
        newest = await cached.fresh()
        if newest.stamp == layer.stamp:
            raise
    return newest, *await prepare(newest)


def _normalized(step: TrainStep, done: Done, *, statistics: bool) -> Normalized:
    named = normalize.named_statistics(step) if statistics else {}
    return Normalized(to_wire(step.output), done.version, done.batch, done.replayed, _to_wire(named))


def _input(read: Read, state: LayerState) -> Tensor:
    (tensor,) = require(read({"input": state.config.dtype}), "input")
    if tensor.shape == (0,):  # `[]`: JSON cannot express the other dimensions of an empty batch
        tensor = Tensor(tensor.dtype, normalize.empty_shape(state.config), tensor.buffer)
    normalize.check_input(state.config, tensor)
    return tensor


def _posted(runtime: Runtime, read: Read, state: LayerState, key: str | None) -> tuple[Posted, IdempotencyToken]:
    moments, tensors = posted_moments(state.config, read(MOMENT_DTYPES))
    return moments, make_token(runtime, key, "moments", *tensors)


def _posted_shard(
    runtime: Runtime, read: Read, state: LayerState, key: str | None, operation: str
) -> tuple[Moments, IdempotencyToken]:
    moments, tensors = posted_shard(state.config, read(MOMENT_DTYPES))
    return moments, make_token(runtime, key, operation, *tensors)


def _batch_and_gradient(read: Read, state: LayerState) -> tuple[Tensor, Tensor]:
    names = ("input", "grad_output")
    batch, grad = require(read(dict.fromkeys(names, state.config.dtype)), *names)
    normalize.check_input(state.config, batch)
    normalize.check_input(state.config, grad, "grad_output")
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


def _unchanged(layer: CommittedLayer, output: torch.Tensor, named: Mapping[str, torch.Tensor]) -> Normalized:
    version, batches = layer.stamp.version, layer.state.num_batches_tracked
    return Normalized(to_wire(output), version, batches, statistics=_to_wire(named), digest=layer.digest)


def _differentiated(version: int, done: gradients.Gradients, *, replayed: bool) -> Differentiated:
    named = {name: tensor for name, tensor in done._asdict().items() if tensor is not None}
    return Differentiated(_to_wire(named), version, replayed)


def _to_wire(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    return {name: to_wire(tensor) for name, tensor in tensors.items()}
