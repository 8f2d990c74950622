"""Running statistics: one module per kind, each an `Accumulator` in the table `ACCUMULATORS`."""

from .base import Accumulator
from .registry import ACCUMULATORS

__all__ = ["ACCUMULATORS", "Accumulator"]
