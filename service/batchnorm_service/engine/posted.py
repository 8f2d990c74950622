"""Decodes moments that a caller sent instead of batches: of one batch, or of a stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from batchnorm_client.kernels.checks import check_enough, least_values
from batchnorm_client.wire.documents import MAX_ROWS, LayerConfig
from batchnorm_client.wire.errors import DtypeMismatch, InvalidRequest, ShapeMismatch
from batchnorm_client.wire.tensors import Tensor as WireTensor

from .moments import Moments
from .moments_stack import MomentsStack
from .tensors import to_torch, to_wire

Posted = Moments | MomentsStack

MOMENT_DTYPES: Final = {"count": "int64", "mean": "float64", "var": "float64"}
"""The tensors of a batch's moments, and the dtypes that JSON numbers get."""

_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")


def posted_moments(config: LayerConfig, tensors: Mapping[str, WireTensor]) -> tuple[Posted, tuple[WireTensor, ...]]:
    """The moments, and their tensors converted to float64, so that the fingerprint does not depend on their dtype.

    Args:
        config: the layer's config.
        tensors: count (an int64 scalar), mean and var (biased), (C,) of any float dtype; or of M batches: count (M,),
            mean and var (M, C).

    Raises:
        InvalidRequest: a tensor is missing, there are no rows or too many, or a count or variance is negative.
        ShapeMismatch, DtypeMismatch: a tensor has another shape or dtype.
        TooFewValues: a count is less than training needs.
    """
    if "count" not in tensors or len(tensors["count"].shape) != 1:
        return _moments(config, tensors, least_values(config), "one number, or (M,) for a stack")
    _check_names(tensors)
    rows = tensors["count"].shape[0]
    _check_int64(tensors["count"])
    if not 1 <= rows <= MAX_ROWS:
        raise InvalidRequest(
            f"a stack has 1 to {MAX_ROWS} rows, got {rows}", field="count", expected=f"1 to {MAX_ROWS} rows", got=rows
        )
    mean, var = (_channels(tensors[name], name, rows, config.num_features) for name in ("mean", "var"))
    stack = MomentsStack(tensors["count"].numpy().tolist(), to_torch(mean).numpy(), to_torch(var).numpy())
    stack.check_signs()
    stack.check_enough(least_values(config))
    return stack, (tensors["count"], mean, var)


def posted_shard(config: LayerConfig, tensors: Mapping[str, WireTensor]) -> tuple[Moments, tuple[WireTensor, ...]]:
    """As `posted_moments`, of one shard of a synchronized batch, which may be empty."""
    return _moments(config, tensors, 0, "one number: a group's shard is one batch")


def check_posted(config: LayerConfig, moments: Posted) -> None:
    """Check moments that were decoded for another state of the layer.

    Raises:
        TooFewValues: a count is less than training needs.
        NonFinite: NaN or infinity, and the layer rejects that.
    """
    if isinstance(moments, MomentsStack):
        moments.check_enough(least_values(config))
    else:
        check_enough(moments.count, least_values(config), "count")
    if config.non_finite == "reject":
        moments.check_finite("mean", "var")


def _moments(
    config: LayerConfig, tensors: Mapping[str, WireTensor], least: int, rule: str
) -> tuple[Moments, tuple[WireTensor, ...]]:
    _check_names(tensors)
    count = _count(tensors["count"], rule)
    mean, var = (_channels(tensors[name], name, config.num_features) for name in ("mean", "var"))
    if (var.numpy() < 0).any():
        raise InvalidRequest("var must not be negative", field="var", expected=">= 0", got=float(var.numpy().min()))
    check_enough(count, least, "count")
    return Moments(count, to_torch(mean), to_torch(var), correction=0), (tensors["count"], mean, var)


def _check_names(tensors: Mapping[str, WireTensor]) -> None:
    for name in MOMENT_DTYPES:
        if name not in tensors:
            raise InvalidRequest(f"{name} is missing", field=name, expected=list(MOMENT_DTYPES), got=list(tensors))


def _check_int64(tensor: WireTensor) -> None:
    if tensor.dtype != "int64":
        raise DtypeMismatch(
            f"count must be int64, got {tensor.dtype}", field="count", expected="int64", got=tensor.dtype
        )


def _count(tensor: WireTensor, rule: str) -> int:
    _check_int64(tensor)
    if tensor.shape != ():
        raise ShapeMismatch(
            f"count must be {rule}, got shape {tensor.shape}", field="count", expected=[], got=list(tensor.shape)
        )
    count = int.from_bytes(tensor.buffer, "little", signed=True)
    if count < 0:
        raise InvalidRequest("count must not be negative", field="count", expected=">= 0", got=count)
    return count


def _channels(tensor: WireTensor, name: str, *shape: int) -> WireTensor:
    """In float64."""
    if tensor.dtype not in _FLOATS:
        raise DtypeMismatch(
            f"{name} must be a float, got {tensor.dtype}", field=name, expected=_FLOATS, got=tensor.dtype
        )
    if tensor.shape != shape:
        raise ShapeMismatch(
            f"{name} must have shape {shape}, got {tensor.shape}",
            field=name,
            expected=list(shape),
            got=list(tensor.shape),
        )
    return tensor if tensor.dtype == "float64" else to_wire(to_torch(tensor).to(torch.float64))
