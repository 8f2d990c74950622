"""The gradient of a normalization that was computed elsewhere.

    output = (x - mean) * invstd * weight + bias

per channel (Ioffe & Szegedy 2015, section 3). The service returns output, mean and invstd; the backward pass needs
nothing else, and uses torch's own kernel, so that gradients are bit-equal to those of `nn.BatchNorm*`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchnorm_client.results import BatchStatistics, Gradients

Forward = Callable[[Tensor, bool], tuple[Tensor, BatchStatistics[Tensor] | None]]
"""(input, whether statistics are wanted) -> (output, the statistics it was normalized with)."""


class SharedBatch(Protocol):
    """The calls of one member of a synchronized batch."""

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        ...

    def backward(self, x: Tensor, grad_output: Tensor) -> Gradients[Tensor]:
        """The gradients."""
        ...


def normalize(
    forward: Forward,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    own: bool,
    eps: float,
    clip: float | None = None,
) -> Tensor:
    """Normalize with `forward`, with gradients for input, weight and bias, including second derivatives.

    Args:
        forward: computes the output, with the same weight, bias and eps. Called once. Statistics are requested only if
            a gradient may be needed.
        x: the input, (N, C, *), not empty.
        weight: (C,), or None.
        bias: (C,), or None.
        own: whether `forward` normalizes with the batch's own statistics, which gradients flow through, or with the
            running ones, which are constants.
        eps: used in the backward pass for running statistics only.
        clip: `forward` clamps the output to [-clip, clip]; no gradient flows from elements that are at a bound.

    Returns:
        The output, in the memory format that torch would return.
    """
    tensors = (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        apply = _Normalize.apply
        return cast(Tensor, apply(x, weight, bias, forward, own, eps, clip))  # type: ignore[no-untyped-call]
    return _formatted(forward(x, False)[0], x)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        forward: Forward,
        own: bool,
        eps: float,
        clip: float | None,
    ) -> Tensor:
        del bias  # its gradient does not depend on its value
        output, statistics = forward(x, True)
        if statistics is None:
            raise RuntimeError("an answer without the statistics that it was asked for")
        mean, spread = statistics.mean, statistics.invstd if own else statistics.var
        clipped = None if clip is None else output.abs() >= min(clip, torch.finfo(output.dtype).max)
        ctx.save_for_backward(x, weight, mean, spread, clipped)
        ctx.own, ctx.eps = own, eps
        return _formatted(output, x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Not once_differentiable: torch's backward kernel is differentiable, so gradient penalties work.
        x, weight, mean, spread, clipped = ctx.saved_tensors
        if clipped is not None:
            grad_output = grad_output.masked_fill(clipped, 0)
        invstd, var = (spread, None) if ctx.own else (None, spread)
        grads = torch.ops.aten.native_batch_norm_backward(
            grad_output,
            x,
            weight,
            None if ctx.own else mean,
            var,
            mean if ctx.own else None,
            invstd,
            ctx.own,
            ctx.eps,
            ctx.needs_input_grad[:3],
        )
        return (*grads, None, None, None, None)


def normalize_shard(shared: SharedBatch, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Normalize a shard of a synchronized batch; its gradient is that of the whole batch.

    Args:
        shared: the calls, with the same weight and bias. Either all members run the backward pass, or none.
        x: the shard, (N, C, *); may be empty.
        weight: (C,), or None; its gradient is the shard's part of the sum, as with `nn.SyncBatchNorm`.
        bias: (C,), or None; as weight.
    """
    return cast(Tensor, _NormalizeShard.apply(x, weight, bias, shared))  # type: ignore[no-untyped-call]


class _NormalizeShard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shared: SharedBatch) -> Tensor:
        del weight, bias  # the service has them
        ctx.save_for_backward(x)
        ctx.shared = shared
        return _formatted(shared.forward(x), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        found = ctx.shared.backward(x, grad_output)
        grads = (found.grad_input, found.grad_weight, found.grad_bias)
        wanted = zip(grads, ctx.needs_input_grad[:3], strict=True)
        return (*(grad if needed else None for grad, needed in wanted), None)


def _formatted(output: Tensor, x: Tensor) -> Tensor:
    """The output in channels-last memory format if the input has it, as torch's batch norm returns it."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(x.dim())
    if wanted is None or x.is_contiguous() or not x.is_contiguous(memory_format=wanted):
        return output
    return output.contiguous(memory_format=wanted)
