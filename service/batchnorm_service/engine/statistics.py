"""What a batch leaves behind (`Moments`), and how it is folded into a layer's running statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchnorm_client.errors import NonFinite

from .state import Channels, LayerState


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and variance per channel of one batch: all that the running statistics need of it.

    Attributes:
        count: values per channel, N*H*W.
        mean: (C,).
        var: (C,).
        correction: as in `torch.var`: 1 when `var` is unbiased (divided by count - 1), 0 when biased.
        strided: whether torch computes such a batch with its kernel for inputs that are neither contiguous nor channels
            last in memory; it rounds running statistics in another way than the other one.
    """

    count: int
    mean: Channels
    var: Channels
    correction: int
    strided: bool = False

    def unbiased_var(self) -> Channels:
        """The variance divided by count - 1: what feeds running_var."""
        return self.var if self.correction == 1 else self.var * (self.count / (self.count - 1))

    def biased_var(self) -> Channels:
        """The variance divided by count: what normalizes the batch."""
        return self.var if self.correction == 0 else self.var * ((self.count - 1) / self.count)

    def check_finite(self) -> None:
        """Raise `NonFinite` when a mean or variance is NaN or infinite."""
        for name, tensor in (("mean", self.mean), ("variance", self.var)):
            check_finite(tensor, f"the batch's {name}", "input")


def check_finite(tensor: Tensor, what: str, field: str) -> None:
    """Raise `NonFinite`, naming `field` and the first such channel, when an element is NaN or infinite."""
    # A sum is finite only if every term is; it can overflow though all are, so only then look at each.
    if math.isfinite(float(tensor.sum())):
        return
    bad = (~tensor.isfinite()).flatten().nonzero()
    if len(bad):
        raise NonFinite(
            f"{what} is not finite in {len(bad)} place(s), first at index {int(bad[0])}; "
            'a layer with non_finite: "allow" takes such batches',
            field=field,
            expected="finite",
            got=str(float(tensor.flatten()[bad[0]])),
        )


def fold(state: LayerState, moments: Moments) -> LayerState:
    """The state after one more batch, by torch's rule (torch.nn.BatchNorm's note on momentum).

        running = (1 - momentum) * running + momentum * batch

    with the unbiased variance of the batch, and momentum 1/i for the i-th batch when it is None. A layer whose tracking
    is off stays as it is.

    Raises:
        NonFinite: the folded statistics would not be finite, and the layer rejects that.
    """
    if not state.tracks:
        return state
    assert state.running_mean is not None  # noqa: S101 - what tracks means
    assert state.running_var is not None  # noqa: S101
    batches = state.num_batches_tracked + 1
    momentum = 1.0 / batches if state.config.momentum is None else state.config.momentum
    mean, var = moments.mean.to(state.dtype), moments.unbiased_var().to(state.dtype)
    if moments.strided or state.dtype == torch.float64:
        mean = _average(state.running_mean, mean, momentum)
        var = _average(state.running_var, var, momentum)
    else:
        mean = _average_in_float32(state.running_mean, mean, momentum, fused=False)
        var = _average_in_float32(state.running_var, var, momentum, fused=True)
    if state.config.non_finite == "reject":
        check_finite(mean, "the folded running_mean", "running_mean")
        check_finite(var, "the folded running_var", "running_var")
    return replace(
        state,
        running_mean=mean,
        running_var=var,
        num_batches_tracked=batches,
        samples_tracked=state.samples_tracked + moments.count,
    )


def _average(running: Channels, batch: Channels, momentum: float) -> Channels:
    """(1 - momentum) * running + momentum * batch in float64, rounded once: what torch's strided kernel does."""
    return ((1 - momentum) * running.double() + momentum * batch.double()).to(running.dtype)


def _average_in_float32(running: Channels, batch: Channels, momentum: float, *, fused: bool) -> Channels:
    """The same as torch's kernel for contiguous float32 does it: momentum, both products and the sum are rounded.

    With `fused` the product with the batch is not: torch's compiler makes the variance a fused multiply-add. The
    product of two float32 is exact in float64, so a sum in float64 gives the same.
    """
    weight = torch.tensor(momentum, dtype=torch.float32)
    kept = (1 - weight) * running
    if not fused:
        return kept + weight * batch
    return (kept.double() + weight.double() * batch.double()).float()
