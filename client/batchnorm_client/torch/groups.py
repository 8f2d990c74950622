"""Synchronized batches: several processes that run the same steps, each with a shard of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from batchnorm_client import Gradients, RemoteLayer

Compute = Literal["remote", "local"]


@dataclass(frozen=True, slots=True)
class Group:
    """The processes that share batches.

    Attributes:
        run: id of their run; it must not be used again while the service keeps receipts.
        size: the number of processes.
        timeout: seconds to wait for the others; None for the service's default.
    """

    run: str
    size: int
    timeout: float | None = None

    @classmethod
    def of(cls, run: str | None, size: int | None, timeout: float | None) -> Group | None:
        """None without a run.

        Raises:
            ValueError: only one of `group` and `group_size` is given.
        """
        if (run is None) != (size is None):
            raise ValueError("group and group_size go together")
        return None if run is None or size is None else cls(run, size, timeout)


@dataclass(frozen=True, slots=True)
class GroupStep:
    """One shared batch: see `autograd.SharedBatch`.

    Attributes:
        layer: of the service.
        group: the processes that share it.
        step: the number of batches that they shared before; the same in all processes.
        compute: where the shard is normalized.
    """

    layer: RemoteLayer
    group: Group
    step: int
    compute: Compute

    def forward(self, x: Tensor) -> Tensor:
        """Train with the shard; with local compute only its moments are sent."""
        call = self.layer.train_local if self.compute == "local" else self.layer.train
        return call(x, group=self._id, size=self.group.size, timeout=self.group.timeout).output

    def backward(self, x: Tensor, grad_output: Tensor) -> Gradients[Tensor]:
        """Exchange the sums of the gradients, which the service computes from the shard and its gradient."""
        return self.layer.backward(
            x, grad_output, group=f"{self._id}.backward", size=self.group.size, timeout=self.group.timeout
        )

    def next(self) -> GroupStep:
        """The batch after this one."""
        return replace(self, step=self.step + 1)

    @property
    def _id(self) -> str:
        return f"{self.group.run}.{self.step}"
