"""The slope of a measurement over time, with a confidence interval that allows for autocorrelation."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

BLOCKS: Final = 12
"""Memory changes in steps that last, so samples a second apart are not independent; means of blocks nearly are."""

_T_95: Final = 2.228
"""Quantile of Student's t for a two-sided interval of 95% with BLOCKS - 2 degrees of freedom."""


class Trend(NamedTuple):
    """Change of a measurement per second.

    Attributes:
        slope: by least squares.
        low, high: the ends of its 95% confidence interval.
    """

    slope: float
    low: float
    high: float

    @property
    def grows(self) -> bool:
        """Whether the interval is above zero."""
        return self.low > 0


def trend(seconds: np.ndarray, values: np.ndarray) -> Trend:
    """The slope of the means of `BLOCKS` consecutive blocks. Both arrays have shape (n,), n >= BLOCKS."""
    x = np.array([part.mean() for part in np.array_split(seconds, BLOCKS)])
    y = np.array([part.mean() for part in np.array_split(values, BLOCKS)])
    centered = x - x.mean()
    slope = float(centered @ y / (centered @ centered))
    residuals = y - y.mean() - slope * centered
    error = float(np.sqrt(residuals @ residuals / (BLOCKS - 2) / (centered @ centered)))
    return Trend(slope, slope - _T_95 * error, slope + _T_95 * error)
