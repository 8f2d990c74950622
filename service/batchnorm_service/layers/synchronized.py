"""The two things that groups do: fold one batch that came in shards, and exchange the sums of its gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from batchnorm_client.tensors import Tensor, decode_safetensors, encode_safetensors

from ..engine.gradients import GradientSums, merge_sums
from ..engine.moments import Moments, merge
from ..engine.tensors import to_torch, to_wire
from .changes import Done, Fold
from .groups import Member, Operation
from .queue import Queue
from .receipts import Ticket
from .records import Held
from .work import GroupWork, Shard


class Part:
    """A member's shard, and its moments.

    Attributes:
        moments: of the shard, or of all shards once they are merged.
        shard: normalizes itself with the whole's statistics.
    """

    def __init__(self, moments: Moments, shard: Shard | None = None) -> None:
        self.moments = moments
        self.shard = shard


class FoldGroup(Operation[Part]):
    """Shards that are normalized together and folded once; some may have stayed with their callers."""

    name = "fold"

    def __init__(self, held: Held, queue: Queue) -> None:
        self.incarnation = held.stamp.incarnation
        self._held = held
        self._queue = queue
        self._channels = held.state.config.num_features

    def merge(self, parts: list[Part]) -> Part:
        """All shards' moments in one."""
        return Part(merge((part.moments for part in parts), self._channels))

    async def commit(self, ticket: Ticket, whole: Part, members: list[Member[Part]], payload: bytes) -> Done:
        """Normalize every shard, then fold the whole once."""
        shards = [member.part.shard for member in members if member.part.shard is not None]
        work = GroupWork(whole.moments, shards)
        await work.under(self._held.state)
        return await self._queue.submit(Fold(ticket, self.incarnation, work, payload))

    def pack(self, whole: Part) -> bytes:
        """Count, mean and variance."""
        return _pack(whole.moments, {})

    def unpack(self, totals: bytes) -> Part:
        """The inverse of `pack`."""
        return Part(_unpack(totals)[0])


class GradientGroup(Operation[GradientSums]):
    """Shards whose gradients are taken together; nothing is folded."""

    name = "backward"

    def __init__(self, held: Held, queue: Queue) -> None:
        self.incarnation = held.stamp.incarnation
        self._queue = queue
        self._channels = held.state.config.num_features

    def merge(self, parts: list[GradientSums]) -> GradientSums:
        """All shards' sums in one."""
        return merge_sums(parts, self._channels)

    async def commit(
        self, ticket: Ticket, whole: GradientSums, members: list[Member[GradientSums]], payload: bytes
    ) -> Done:
        """Note the sums, so that a member whose answer was lost can have it again."""
        return await self._queue.note(ticket, self.incarnation, payload)

    def pack(self, whole: GradientSums) -> bytes:
        """Count, mean, variance and the two sums."""
        return _pack(whole.moments, {"grad": whole.grad, "grad_centered": whole.grad_centered})

    def unpack(self, totals: bytes) -> GradientSums:
        """The inverse of `pack`."""
        moments, sums = _unpack(totals)
        return GradientSums(moments, to_torch(sums["grad"]), to_torch(sums["grad_centered"]))


def _pack(moments: Moments, sums: Mapping[str, torch.Tensor]) -> bytes:
    tensors = {"mean": moments.mean, "var": moments.biased_var(), **sums}
    wire = {"count": Tensor("int64", (), moments.count.to_bytes(8, "little"))}
    return b"".join(encode_safetensors(wire | {name: to_wire(tensor) for name, tensor in tensors.items()}))


def _unpack(totals: bytes) -> tuple[Moments, dict[str, Tensor]]:
    tensors, _ = decode_safetensors(bytearray(totals))
    count = int(to_torch(tensors["count"]))
    return Moments(count, to_torch(tensors["mean"]), to_torch(tensors["var"]), correction=0), tensors
