"""The kinds of running statistics that the service computes."""

from __future__ import annotations

from typing import Final

from .base import Accumulator
from .moving import Moving
from .population import Population

ACCUMULATORS: Final[dict[str, Accumulator]] = {
    "moving": Moving(),
    "population": Population(),
}
"""By the name that a layer's config has for it; `batchnorm_client.wire.statistics` has the same names."""
