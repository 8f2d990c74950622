"""The only place where a layer's state changes: the cache of resident layers, their fold queues, and the commits."""

from .layers import Layers
from .results import LayersOptions, Normalized, Snapshot

__all__ = ["Layers", "LayersOptions", "Normalized", "Snapshot"]
