"""Undoing eval: what comes back is what went in."""

from __future__ import annotations

import pytest
import torch

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_service.engine.inverse import inverse_step
from batchnorm_service.engine.normalize import eval_step
from batchnorm_service.engine.state import initial_state, update
from batchnorm_service.engine.state_dict import replace_tensors
from batchnorm_service.engine.tensors import to_wire


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5), ("float16", 2e-2)])
def test_inverse_of_eval_gives_the_input_back(axis: int, affine: bool, dtype: str, tolerance: float) -> None:
    kept = "float64" if dtype == "float64" else "float32"
    state = initial_state(LayerConfig(num_features=3, dtype=kept, channel_axis=axis, affine=affine))
    tensors = {"running_mean": torch.tensor([5.0, -3.0, 0.1]), "running_var": torch.tensor([4.0, 0.25, 9.0])}
    if affine:
        tensors |= {"weight": torch.tensor([2.0, -1.0, 0.5]), "bias": torch.tensor([1.0, 0.0, -4.0])}
    state = replace_tensors(state, {name: to_wire(tensor.to(state.dtype)) for name, tensor in tensors.items()})
    shape = (4, 3, 3, 3)
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(getattr(torch, dtype))
    back = inverse_step(state, eval_step(state, batch))
    assert back.dtype == batch.dtype
    assert torch.allclose(back, batch, rtol=tolerance, atol=tolerance * 10)


def test_what_cannot_be_undone_is_refused_by_name() -> None:
    batch = torch.ones(2, 3)
    flat = update(initial_state(LayerConfig(num_features=3)), LayerUpdate(weight=[1.0, 0.0, 1.0]))
    with pytest.raises(errors.InvalidRequest, match="channel 1"):
        inverse_step(flat, batch)
    with pytest.raises(errors.InvalidRequest) as refused:
        inverse_step(initial_state(LayerConfig(num_features=3, track_running_stats=False)), batch)
    assert refused.value.fields["field"] == "track_running_stats"
    assert inverse_step(initial_state(LayerConfig(num_features=3)), batch[:0]).shape == (0, 3)
