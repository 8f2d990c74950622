"""The operations of groups: fold one batch that is sent in shards, and sum its gradients over the shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from batchnorm_client.wire.tensors import Tensor, decode_safetensors, encode_safetensors

from ..engine.gradients import GradientSums, merge_sums
from ..engine.moments import Extremes, Moments, merge, merge_extremes
from ..engine.normalize import OutputParameters
from ..engine.tensors import to_torch, to_wire
from .idempotency import NO_FINGERPRINT, IdempotencyToken
from .moments_source import GroupSource
from .records import UNREADABLE, CommittedLayer
from .update_queue import UpdateQueue
from .updates import Fold


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Statistics of a shard, or of all shards merged.

    Attributes:
        moments: count, mean and variance.
        extremes: the smallest and largest values, to detect an overflow of any shard's output before the fold.
        parameters: of the whole: the weight, bias, eps and clip that every shard is normalized with.
    """

    moments: Moments
    extremes: Extremes
    parameters: OutputParameters | None = None


class FoldGroup:
    """Train: shards are normalized with the statistics of all of them, which are folded once.

    Members of a moments call keep their shards and send only the moments.
    """

    name = "fold"
    folds = True

    def __init__(self, layer: CommittedLayer, queue: UpdateQueue) -> None:
        self.incarnation = layer.stamp.incarnation
        self._layer = layer
        self._queue = queue

    def merge(self, parts: list[Part]) -> Part:
        """The moments and extremes of all shards."""
        channels = self._layer.state.config.num_features
        moments = merge((part.moments for part in parts), channels)
        return Part(moments, merge_extremes([part.extremes for part in parts], channels))

    async def close(
        self, token: IdempotencyToken, whole: Part, members: Mapping[bytes, bytes], result: Callable[[bytes], bytes]
    ) -> None:
        """Fold the whole once. The receipt's payload has the parameters of the state that it is committed on."""

        def payload(parameters: OutputParameters) -> bytes:
            return result(self.pack(Part(whole.moments, whole.extremes, parameters)))

        source = GroupSource(whole.moments, whole.extremes, payload)
        await source.compute(self._layer.state)
        keyed = {key: fingerprint for key, fingerprint in members.items() if fingerprint != NO_FINGERPRINT}
        await self._queue.submit(Fold(token, self.incarnation, source, keyed))

    def pack(self, part: Part) -> bytes:
        """A safetensors file."""
        tensors: dict[str, torch.Tensor | None] = {"low": part.extremes.low, "high": part.extremes.high}
        metadata = {"limit": repr(part.extremes.limit)}
        if part.parameters is not None:
            metadata["eps"] = repr(part.parameters.eps)
            metadata["clip"] = repr(part.parameters.clip)
            tensors |= {"weight": part.parameters.weight, "bias": part.parameters.bias}
        return _pack(part.moments, tensors, metadata)

    def unpack(self, data: bytes) -> Part:
        """The inverse of `pack`. Raises `ValueError` when it is damaged."""
        with _reading():
            moments, tensors, metadata = _unpack(data)
            extremes = Extremes(tensors["low"], tensors["high"], float(metadata["limit"]))
            parameters = None
            if "eps" in metadata:
                clip = None if metadata["clip"] == "None" else float(metadata["clip"])
                parameters = OutputParameters(tensors.get("weight"), tensors.get("bias"), float(metadata["eps"]), clip)
            return Part(moments, extremes, parameters)


class GradientGroup:
    """Backward: the sums over all shards that each shard's gradients need; nothing is folded."""

    name = "backward"
    folds = False

    def __init__(self, layer: CommittedLayer, queue: UpdateQueue) -> None:
        self.incarnation = layer.stamp.incarnation
        self._queue = queue
        self._channels = layer.state.config.num_features

    def merge(self, parts: list[GradientSums]) -> GradientSums:
        """The sums over all shards."""
        return merge_sums(parts, self._channels)

    async def close(
        self,
        token: IdempotencyToken,
        whole: GradientSums,
        members: Mapping[bytes, bytes],
        result: Callable[[bytes], bytes],
    ) -> None:
        """Write the sums as a receipt."""
        await self._queue.note(token, self.incarnation, result(self.pack(whole)))

    def pack(self, part: GradientSums) -> bytes:
        """A safetensors file."""
        return _pack(part.moments, {"grad": part.grad, "grad_centered": part.grad_centered}, {})

    def unpack(self, data: bytes) -> GradientSums:
        """The inverse of `pack`. Raises `ValueError` when it is damaged."""
        with _reading():
            moments, sums, _ = _unpack(data)
            return GradientSums(moments, sums["grad"], sums["grad_centered"])


@contextmanager
def _reading() -> Iterator[None]:
    """Damaged bytes are the store's fault: a `ProblemError` would be reported as the client's error."""
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(f"a part of a group cannot be read: {error!r}") from error


def _pack(moments: Moments, others: Mapping[str, torch.Tensor | None], metadata: Mapping[str, str]) -> bytes:
    tensors = {"mean": moments.mean, "var": moments.biased_var(), **others}
    wire = {"count": Tensor("int64", (), moments.count.to_bytes(8, "little"))}
    # 8-byte dtypes first, so that every tensor is aligned: only weight and bias may be narrower, and they are last.
    wire |= {name: to_wire(tensor) for name, tensor in tensors.items() if tensor is not None}
    return b"".join(encode_safetensors(wire, metadata))


def _unpack(data: bytes) -> tuple[Moments, dict[str, torch.Tensor], Mapping[str, str]]:
    wire, metadata = decode_safetensors(bytearray(data))
    tensors = {name: to_torch(tensor) for name, tensor in wire.items()}
    moments = Moments(int(tensors["count"]), tensors["mean"], tensors["var"], correction=0)
    return moments, tensors, metadata
