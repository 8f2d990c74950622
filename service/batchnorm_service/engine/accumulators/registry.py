"""The registry of kinds of running statistics."""

from __future__ import annotations

from typing import Final

from .base import Accumulator
from .moving import Moving
from .population import Population

ACCUMULATORS: Final[dict[str, Accumulator]] = {
    "moving": Moving(),
    "population": Population(),
}
"""By the value of `statistics` in a layer's config; `batchnorm_client.wire.statistics` has the same names."""
