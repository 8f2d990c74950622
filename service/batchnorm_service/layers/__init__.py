"""Operations on named layers: cache, update queues and commits. No other package changes a layer's state."""

from ..engine.posted import MOMENT_DTYPES
from .batches import Batches
from .cached_state import layer_not_found
from .fair_pool import CALLED_LAYER
from .groups import GroupCall
from .layers import Layers
from .results import Differentiated, Folded, LayersOptions, Normalized, Snapshot

__all__ = [
    "CALLED_LAYER",
    "MOMENT_DTYPES",
    "Batches",
    "Differentiated",
    "Folded",
    "GroupCall",
    "Layers",
    "LayersOptions",
    "Normalized",
    "Snapshot",
    "layer_not_found",
]
