"""A layer's values per channel, for tables and charts: at most so many numbers, however many channels there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from batchnorm_client.wire.tensors import Tensor, widened

Array = npt.NDArray[Any]

MAX_POINTS: Final = 8192
"""Layers with more channels are drawn as ranges over this many groups of neighbouring channels, or half as many."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A vector in a few numbers, and where the extremes are.

    Attributes:
        label, symbol: what it is.
        low, middle, high: the smallest value, the median and the largest one; None if all are NaN.
        low_at, high_at: their channels.
        not_finite: how many values are NaN or infinite.
    """

    label: str
    symbol: str
    low: float | None
    middle: float | None
    high: float | None
    low_at: int
    high_at: int
    not_finite: int


_SHOWN: Final = {
    "mean": ("Running mean", "μ"),
    "std": ("Running standard deviation", "\N{GREEK SMALL LETTER SIGMA}"),
    "weight": ("Weight", "\N{GREEK SMALL LETTER GAMMA}"),
    "bias": ("Bias", "β"),
}


def channel_values(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """What is shown of each channel: mean, std, weight and bias, (C,) each, those that the layer has."""
    names = ("running_mean", "running_var", "weight", "bias")
    found = {name: widened(tensors[name]) for name in names if name in tensors}
    values: dict[str, Array] = {}
    if "running_mean" in found:
        with np.errstate(invalid="ignore"):  # a negative variance can be put there
            values |= {"mean": found["running_mean"], "std": np.sqrt(found["running_var"])}
    return values | {name: found[name] for name in ("weight", "bias") if name in found}


def summaries(tensors: Mapping[str, Tensor]) -> list[Summary]:
    """Each vector in a few numbers."""
    return [_summary(*_SHOWN[name], values) for name, values in channel_values(tensors).items()]


def _summary(label: str, symbol: str, values: Array) -> Summary:
    missing = int(np.count_nonzero(~np.isfinite(values)))
    if np.isnan(values).all():
        return Summary(label, symbol, None, None, None, 0, 0, missing)
    low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
    with np.errstate(invalid="ignore"):
        middle = float(np.nanmedian(values))
    return Summary(label, symbol, float(values[low]), middle, float(values[high]), low, high, missing)


def chart_data(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The vectors for charts: `step` channels to a point, with the lowest and the highest value of each.

    With one channel to a point, `high` is null: it is the same as `low`.
    """
    values = channel_values(tensors)
    channels = len(next(iter(values.values()))) if values else 0
    step = -(-channels // MAX_POINTS) if channels > MAX_POINTS else 1
    if "mean" in values:
        with np.errstate(invalid="ignore", over="ignore"):
            values |= {"lower": values["mean"] - values["std"], "upper": values["mean"] + values["std"]}
    series = {name: _grouped(each, step) for name, each in values.items()}
    return {"channels": channels, "step": step, "series": series}


def _grouped(values: Array, step: int) -> dict[str, Array | None]:
    if step == 1:
        return {"low": np.ascontiguousarray(values), "high": None}
    starts = np.arange(0, len(values), step)
    return {"low": np.fmin.reduceat(values, starts), "high": np.fmax.reduceat(values, starts)}
