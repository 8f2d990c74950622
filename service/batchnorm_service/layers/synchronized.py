"""The two things that groups do: fold one batch that came in shards, and exchange the sums of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from batchnorm_client.wire.tensors import Tensor, decode_safetensors, encode_safetensors

from ..engine.gradients import GradientSums, merge_sums
from ..engine.moments import Extremes, Moments, merge, merge_extremes
from ..engine.normalize import Frozen
from ..engine.tensors import to_torch, to_wire
from .idempotency import NO_FINGERPRINT, IdempotencyToken
from .moments_source import GroupSource
from .records import CommittedLayer
from .update_queue import Queue
from .updates import Fold


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What a shard says of itself, or what all shards say together.

    Attributes:
        moments: count, mean and variance.
        extremes: the smallest and largest values, so that an output that would overflow is found before the fold.
        frozen: of the whole: the weight, bias and eps that every shard is normalized with.
    """

    moments: Moments
    extremes: Extremes
    frozen: Frozen | None = None


class FoldGroup:
    """Shards that are normalized together and folded once; some may have stayed with their callers."""

    name = "fold"
    folds = True

    def __init__(self, layer: CommittedLayer, queue: Queue) -> None:
        self.incarnation = layer.stamp.incarnation
        self._held = layer
        self._queue = queue

    def merge(self, parts: list[Part]) -> Part:
        """All shards' moments in one."""
        channels = self._held.state.config.num_features
        moments = merge((part.moments for part in parts), channels)
        return Part(moments, merge_extremes([part.extremes for part in parts], channels))

    async def close(
        self, token: IdempotencyToken, whole: Part, members: Mapping[bytes, bytes], result: Callable[[bytes], bytes]
    ) -> None:
        """Fold the whole once, under the state that the commit is made on."""

        def payload(frozen: Frozen) -> bytes:
            return result(self.pack(Part(whole.moments, whole.extremes, frozen)))

        source = GroupSource(whole.moments, whole.extremes, payload)
        await source.under(self._held.state)
        keyed = {key: fingerprint for key, fingerprint in members.items() if fingerprint != NO_FINGERPRINT}
        await self._queue.submit(Fold(token, self.incarnation, source, keyed))

    def pack(self, part: Part) -> bytes:
        """A safetensors file."""
        tensors: dict[str, torch.Tensor | None] = {"low": part.extremes.low, "high": part.extremes.high}
        metadata = {"limit": repr(part.extremes.limit)}
        if part.frozen is not None:
            metadata["eps"] = repr(part.frozen.eps)
            metadata["clip"] = repr(part.frozen.clip)
            tensors |= {"weight": part.frozen.weight, "bias": part.frozen.bias}
        return _pack(part.moments, tensors, metadata)

    def unpack(self, data: bytes) -> Part:
        """The inverse of `pack`."""
        moments, tensors, metadata = _unpack(data)
        extremes = Extremes(tensors["low"], tensors["high"], float(metadata["limit"]))
        frozen = None
        if "eps" in metadata:
            clip = None if metadata["clip"] == "None" else float(metadata["clip"])
            frozen = Frozen(tensors.get("weight"), tensors.get("bias"), float(metadata["eps"]), clip)
        return Part(moments, extremes, frozen)


class GradientGroup:
    """Shards whose gradients are taken together; nothing is folded."""

    name = "backward"
    folds = False

    def __init__(self, layer: CommittedLayer, queue: Queue) -> None:
        self.incarnation = layer.stamp.incarnation
        self._queue = queue
        self._channels = layer.state.config.num_features

    def merge(self, parts: list[GradientSums]) -> GradientSums:
        """All shards' sums in one."""
        return merge_sums(parts, self._channels)

    async def close(
        self,
        token: IdempotencyToken,
        whole: GradientSums,
        members: Mapping[bytes, bytes],
        result: Callable[[bytes], bytes],
    ) -> None:
        """Note the sums."""
        await self._queue.note(token, self.incarnation, result(self.pack(whole)))

    def pack(self, part: GradientSums) -> bytes:
        """A safetensors file."""
        return _pack(part.moments, {"grad": part.grad, "grad_centered": part.grad_centered}, {})

    def unpack(self, data: bytes) -> GradientSums:
        """The inverse of `pack`."""
        moments, sums, _ = _unpack(data)
        return GradientSums(moments, sums["grad"], sums["grad_centered"])


def _pack(moments: Moments, others: Mapping[str, torch.Tensor | None], metadata: Mapping[str, str]) -> bytes:
    tensors = {"mean": moments.mean, "var": moments.biased_var(), **others}
    wire = {"count": Tensor("int64", (), moments.count.to_bytes(8, "little"))}
    # 8-byte dtypes first, so that every tensor is aligned: only weight and bias may be narrower, and they come last.
    wire |= {name: to_wire(tensor) for name, tensor in tensors.items() if tensor is not None}
    return b"".join(encode_safetensors(wire, metadata))


def _unpack(data: bytes) -> tuple[Moments, dict[str, torch.Tensor], Mapping[str, str]]:
    wire, metadata = decode_safetensors(bytearray(data))
    tensors = {name: to_torch(tensor) for name, tensor in wire.items()}
    moments = Moments(int(tensors["count"]), tensors["mean"], tensors["var"], correction=0)
    return moments, tensors, metadata
