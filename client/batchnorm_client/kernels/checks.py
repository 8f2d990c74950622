"""Checks of a batch against the layer, before anything is computed or copied."""

from __future__ import annotations

from batchnorm_client.wire.documents import INPUT_DTYPES, LayerConfig
from batchnorm_client.wire.errors import DtypeMismatch, ShapeMismatch, TooFewValues
from batchnorm_client.wire.statistics import STATISTICS
from batchnorm_client.wire.tensors.tensor import MAX_RANK


def check_input(config: LayerConfig, dtype: str, shape: tuple[int, ...], field: str = "input") -> None:
    """Refuse a batch that does not fit the layer.

    Args:
        config: of the layer.
        dtype: of the batch, torch's name.
        shape: of the batch.
        field: the batch's name in error messages.

    Raises:
        DtypeMismatch: not an input dtype of this layer.
        ShapeMismatch: another rank, or another number of channels, than the layer has.
    """
    allowed = INPUT_DTYPES[config.dtype]
    if dtype not in allowed:
        raise DtypeMismatch(
            f"{field} must be {' or '.join(allowed)} for a {config.dtype} layer, got {dtype}",
            field=field,
            expected=list(allowed),
            got=dtype,
        )
    ranks, axis, rank = config.input_ranks, config.channel_axis, len(shape)
    if rank not in ranks if ranks else not 2 <= rank <= MAX_RANK:
        raise ShapeMismatch(
            f"{field} must have rank {' or '.join(map(str, ranks)) if ranks else '2 to 64'}, got shape {shape}",
            field=field,
            expected={"rank": list(ranks) if ranks else ">= 2"},
            got=list(shape),
        )
    if not -rank < axis < rank or shape[axis] != config.num_features:
        raise ShapeMismatch(
            f"{field} must have {config.num_features} channels on axis {axis}, got shape {shape}",
            field=field,
            expected={"num_features": config.num_features, "channel_axis": axis},
            got=list(shape),
        )


def least_values(config: LayerConfig) -> int:
    """How many values per channel a training batch needs."""
    return STATISTICS[config.statistics].least_values


def check_enough(count: int, least: int, field: str = "input") -> None:
    """Raise `TooFewValues` when a batch has fewer than `least` values per channel."""
    if count < least:
        raise TooFewValues(
            f"batch statistics need at least {least} value(s) per channel, got {count}",
            field=field,
            expected=f">= {least}",
            got=count,
        )
