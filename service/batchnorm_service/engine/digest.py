"""The digest of a layer's state."""

from __future__ import annotations

from batchnorm_client.kernels.digest import state_digest

from .state import LayerState


def digest(state: LayerState) -> str:
    """See `state_digest`. Counters and what eval does not use are not part of it."""
    config = state.config
    vectors = (state.running_mean, state.running_var, state.weight, state.bias)
    return state_digest(
        config.dtype,
        config.channel_axis,
        config.eps,
        config.clip,
        [None if vector is None else vector.numpy() for vector in vectors],
    )
