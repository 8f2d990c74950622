"""The inverse of eval mode, like scikit-learn's `inverse_transform` and VecNormalize's `unnormalize_obs`."""

from __future__ import annotations

import torch

from batchnorm_client.wire.errors import InvalidRequest

from .layout import Batch, channels_back, channels_second, fetch, per_channel, to_device_of
from .state import LayerState


def inverse_step(state: LayerState, batch: Batch) -> Batch:
    """(batch - bias) / weight * sqrt(running_var + eps) + running_mean, in the batch's dtype, on the CPU.

    Values that `clip` bounded are not restored.

    Raises:
        InvalidRequest: the layer has no running statistics, or a weight is 0.
    """
    if state.running_mean is None or state.running_var is None:
        raise InvalidRequest(
            "the layer was created without running statistics: there is nothing to undo",
            field="track_running_stats",
            expected=True,
            got=False,
        )
    if state.weight is not None and bool((state.weight == 0).any()):
        channel = int((state.weight == 0).nonzero()[0])
        raise InvalidRequest(
            f"weight is 0 in channel {channel}: every input has the same output there",
            field="weight",
            expected="not 0",
            got=0,
        )
    # Scale and shift are computed in float64, (C,); the batch needs one multiplication and one addition.
    scale = (state.running_var.double() + state.config.eps).sqrt()
    shift = state.running_mean.double()
    if state.weight is not None and state.bias is not None:
        scale = scale / state.weight.double()
        shift = shift - state.bias.double() * scale
    moved = channels_second(state.config, batch)
    device_scale, device_shift = to_device_of(moved, scale.to(state.dtype), shift.to(state.dtype))
    assert device_scale is not None  # noqa: S101 - `to_device_of` returns None only for None
    assert device_shift is not None  # noqa: S101
    output = torch.addcmul(per_channel(device_shift, moved), moved.to(state.dtype), per_channel(device_scale, moved))
    return fetch(batch, channels_back(state.config, output.to(batch.dtype)))[0]
