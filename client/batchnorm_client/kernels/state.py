"""The state of a layer for normalizing a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm_client.kernels.digest import state_digest
from batchnorm_client.wire.documents import Layer, LayerConfig


@dataclass(frozen=True, slots=True, eq=False)
class LocalState:
    """The state of a layer for normalizing a batch.

    Attributes:
        config: of the layer, with its present eps and clip.
        version: of the commit that it was read at.
        num_batches_tracked: at that commit.
        weight: gamma, (C,) in the layer's dtype, numpy or torch; None unless affine.
        bias: beta, (C,); None unless affine.
        running_mean: (C,); None if the layer has none.
        running_var: (C,); None with running_mean.
        digest: as the service gives it; empty if it is not a state of the service.
    """

    config: LayerConfig
    version: int
    num_batches_tracked: int
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    digest: str

    @classmethod
    def of(cls, layer: Layer) -> LocalState:
        """The state in a `Layer` document, whose numbers are exact."""
        texts = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        weight, bias, mean, var = (None if text is None else np.array(text, layer.config.dtype) for text in texts)
        return cls(layer.config, layer.version, layer.num_batches_tracked, weight, bias, mean, var, layer.digest)

    def computed_digest(self) -> str:
        """The digest of these numbers, which are numpy arrays. With NaN, `digest`: JSON does not have its bits."""
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        if any(vector is not None and np.isnan(vector).any() for vector in vectors):
            return self.digest
        config = self.config
        return state_digest(config.dtype, config.channel_axis, config.eps, config.clip, vectors)
