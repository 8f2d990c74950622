"""The example of a first visit: three layers as a small image model and an agent would have them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.names import check_layer_name
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.layers import Layers, Read

_BATCHES: Final = 24
_PINNED_AFTER: Final = 12
_TAG: Final = "baseline"
_DRIFTING: Final = "example.observations"
_DRIFTING_CHANNELS: Final = [3, 4]
"""What comes in after the training is different in these channels."""

_LAYERS: Final = {
    "example.encoder.bn1": LayerConfig(num_features=64, dimensions=2),
    "example.encoder.bn2": LayerConfig(num_features=256),
    "example.observations": LayerConfig(num_features=12, statistics="population", momentum=None),
}


async def load_example(layers: Layers, prefix: str) -> None:
    """Create the layers, whose names start with `prefix`, and train them. Repeated, it folds nothing a second time.

    Raises:
        InvalidRequest: with this prefix, the names would be too long.
    """
    for last in _LAYERS:
        check_layer_name(f"{prefix}{last}")
    for number, (last, config) in enumerate(_LAYERS.items()):
        name = f"{prefix}{last}"
        layer, _ = await layers.create(name, config)
        if layer.num_batches_tracked:
            continue
        random = np.random.default_rng(number)
        channels = np.arange(config.num_features)
        mean = 2 * np.sin(channels / 9) + random.normal(0, 0.4, config.num_features)
        std = 0.6 + random.gamma(2, 0.5, config.num_features)
        for batch in range(_BATCHES):
            shape = (16, config.num_features, 4, 4) if config.dimensions == 2 else (64, config.num_features)
            axes = (...,) + (None,) * (len(shape) - 2)
            values = random.normal(mean[axes], std[axes], shape).astype(np.float32)
            await layers.batches.train(name, _reader(values), f"example-{batch}")
            if batch + 1 == _PINNED_AFTER:
                await layers.history.pin(name, _TAG, None, "example-pin")
        if last == _DRIFTING:
            for _ in range(_BATCHES):
                other = random.normal(mean, std, (64, config.num_features))
                other[:, _DRIFTING_CHANNELS] += 1.5 * std[_DRIFTING_CHANNELS]
                await layers.batches.eval(name, _reader(other.astype(np.float32)))


def _reader(values: npt.NDArray[Any]) -> Read:
    return lambda _: {"input": Tensor.of(values)}
