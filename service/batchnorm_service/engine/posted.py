"""Decodes moments that a caller sent instead of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from batchnorm_client.kernels.checks import check_enough, least_values
from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.errors import DtypeMismatch, InvalidRequest, ShapeMismatch
from batchnorm_client.wire.tensors import Tensor as WireTensor

from .moments import Channels, Moments
from .tensors import to_torch, to_wire

MOMENT_DTYPES: Final = {"count": "int64", "mean": "float64", "var": "float64"}
"""The tensors of a batch's moments, and the dtypes that JSON numbers get."""

_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")


def posted_moments(
    config: LayerConfig, tensors: Mapping[str, WireTensor], *, least: int | None = None
) -> tuple[Moments, tuple[WireTensor, ...]]:
    """The moments, and their tensors converted to float64, so that the fingerprint does not depend on their dtype.

    Args:
        config: the layer's config.
        tensors: count (an int64 scalar), mean and var (biased), (C,) of any float dtype.
        least: the minimum of values per channel; by default that of training.

    Raises:
        InvalidRequest: a tensor is missing, or count or a variance is negative.
        ShapeMismatch, DtypeMismatch: a tensor has another shape or dtype.
        TooFewValues: the count is less than `least`.
    """
    for name in MOMENT_DTYPES:
        if name not in tensors:
            raise InvalidRequest(f"{name} is missing", field=name, expected=list(MOMENT_DTYPES), got=list(tensors))
    count = _count(tensors["count"])
    mean, var = (_channels(config, tensors[name], name) for name in ("mean", "var"))
    if bool((var < 0).any()):
        raise InvalidRequest("var must not be negative", field="var", expected=">= 0", got=float(var.min()))
    check_enough(count, least_values(config) if least is None else least, "count")
    return Moments(count, mean, var, correction=0), (tensors["count"], to_wire(mean), to_wire(var))


def _count(tensor: WireTensor) -> int:
    if tensor.dtype != "int64":
        raise DtypeMismatch(
            f"count must be int64, got {tensor.dtype}", field="count", expected="int64", got=tensor.dtype
        )
    if tensor.shape != ():
        raise ShapeMismatch(
            f"count must be one number, got shape {tensor.shape}", field="count", expected=[], got=list(tensor.shape)
        )
    count = int(to_torch(tensor))
    if count < 0:
        raise InvalidRequest("count must not be negative", field="count", expected=">= 0", got=count)
    return count


def _channels(config: LayerConfig, tensor: WireTensor, name: str) -> Channels:
    if tensor.dtype not in _FLOATS:
        raise DtypeMismatch(
            f"{name} must be a float, got {tensor.dtype}", field=name, expected=_FLOATS, got=tensor.dtype
        )
    if tensor.shape != (config.num_features,):
        raise ShapeMismatch(
            f"{name} must have shape ({config.num_features},), got {tensor.shape}",
            field=name,
            expected=[config.num_features],
            got=list(tensor.shape),
        )
    return to_torch(tensor).to(torch.float64)
