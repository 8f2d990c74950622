"""Operations on named layers: cache, update queues and commits. No other package changes a layer's state."""

from ..engine.posted import MOMENT_DTYPES
from .batches import Batches, Read
from .cached_state import layer_not_found
from .drift_state import DriftReport
from .fair_pool import CALLED_LAYER
from .groups import GroupCall
from .layer_states import LayerStates
from .layers import Layers
from .results import Differentiated, DriftOptions, Folded, LayersOptions, Normalized, Snapshot
from .states import MAX_LAYERS, Found, is_known
from .updates import Done
from .watches import Selection

__all__ = [
    "CALLED_LAYER",
    "MAX_LAYERS",
    "MOMENT_DTYPES",
    "Batches",
    "Differentiated",
    "Done",
    "DriftOptions",
    "DriftReport",
    "Folded",
    "Found",
    "GroupCall",
    "LayerStates",
    "Layers",
    "LayersOptions",
    "Normalized",
    "Read",
    "Selection",
    "Snapshot",
    "is_known",
    "layer_not_found",
]
