"""The only place where a layer's state changes: the cache of layers, their update queues, and the commits."""

from ..engine.posted import MOMENT_DTYPES
from .batches import Batches
from .groups import GroupCall
from .layers import Layers
from .results import Differentiated, Folded, LayersOptions, Normalized, Snapshot

__all__ = [
    "MOMENT_DTYPES",
    "Batches",
    "Differentiated",
    "Folded",
    "GroupCall",
    "Layers",
    "LayersOptions",
    "Normalized",
    "Snapshot",
]
