"""The changes of a layer's state that need no batch, against torch's own module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig, LayerUpdate
from batchnorm_client.wire.tensors import Tensor
from batchnorm_service.engine.state import initial_state, reset, update
from batchnorm_service.engine.state_dict import dtypes, replace_tensors, state_dict
from batchnorm_service.engine.tensors import to_torch, to_wire

CONFIG = LayerConfig(num_features=3)


def _wire(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return to_wire(torch.tensor(values, dtype=dtype))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_a_new_layer_has_the_state_dict_of_torchs_module(affine: bool, tracks: bool) -> None:
    module = nn.BatchNorm1d(3, affine=affine, track_running_stats=tracks)
    state = initial_state(LayerConfig(num_features=3, affine=affine, track_running_stats=tracks))
    ours = {name: to_torch(tensor) for name, tensor in state_dict(state).items()}
    theirs = module.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor)
        assert ours[name].dtype == tensor.dtype
        assert dtypes(state)[name] == str(tensor.dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("running_stats", {"running_mean", "running_var", "num_batches_tracked"}),
        ("parameters", {"weight", "bias"}),
        ("all", {"running_mean", "running_var", "num_batches_tracked", "weight", "bias"}),
    ],
)
def test_reset_sets_back_what_it_names_and_nothing_else(what: str, changed: set[str]) -> None:
    trained = replace_tensors(
        initial_state(CONFIG),
        {
            "weight": _wire([2, 3, 4]),
            "bias": _wire([5, 6, 7]),
            "running_mean": _wire([8, 9, 10]),
            "running_var": _wire([11, 12, 13]),
            "num_batches_tracked": Tensor("int64", (), (14).to_bytes(8, "little")),
        },
    )
    fresh, after = state_dict(initial_state(CONFIG)), state_dict(reset(trained, what))
    for name, tensor in state_dict(trained).items():
        expected = fresh[name] if name in changed else tensor
        assert bytes(after[name].buffer) == bytes(expected.buffer), name


def test_reset_leaves_the_statistics_of_a_layer_alone_whose_tracking_is_off_as_torch_does() -> None:
    module = nn.BatchNorm1d(3)
    module.running_mean.fill_(4)
    module.track_running_stats = False
    module.reset_running_stats()
    state = replace_tensors(initial_state(CONFIG), {"running_mean": _wire([4, 4, 4])})
    state = reset(update(state, LayerUpdate(track_running_stats=False)), "running_stats")
    assert torch.equal(state.running_mean, module.running_mean)


def test_update_sets_only_what_is_given() -> None:
    state = initial_state(CONFIG)
    changed = update(state, LayerUpdate(momentum=None, weight=[1.0, 2.0, float("nan")]))
    assert changed.config.momentum is None
    assert changed.config.eps == state.config.eps
    assert changed.bias is state.bias
    assert torch.equal(changed.weight.nan_to_num(7.0), torch.tensor([1.0, 2.0, 7.0]))
    assert state.config.momentum == 0.1
    assert torch.equal(state.weight, torch.ones(3))


@pytest.mark.parametrize(
    ("config", "change", "error", "field"),
    [
        ({}, {"weight": [1.0, 2.0]}, errors.ShapeMismatch, "weight"),
        ({}, {"bias": [1e39, 0.0, 0.0]}, errors.InvalidRequest, "bias"),
        ({"affine": False}, {"weight": [1.0, 2.0, 3.0]}, errors.InvalidRequest, "weight"),
        ({"track_running_stats": False}, {"track_running_stats": True}, errors.InvalidRequest, "track_running_stats"),
        ({"statistics": "population"}, {"momentum": 0.1}, errors.InvalidRequest, "momentum"),
    ],
)
def test_update_refuses_by_name(config: dict, change: dict, error: type, field: str) -> None:
    with pytest.raises(error) as refused:
        update(initial_state(LayerConfig(num_features=3, **config)), LayerUpdate(**change))
    assert refused.value.fields["field"] == field


@pytest.mark.parametrize(
    ("tensors", "error", "field"),
    [
        ({}, errors.InvalidRequest, "state"),
        ({"gamma": _wire([1, 2, 3])}, errors.InvalidRequest, "gamma"),
        ({"weight": _wire([1, 2])}, errors.ShapeMismatch, "weight"),
        ({"weight": _wire([1, 2, 3], torch.float64)}, errors.DtypeMismatch, "weight"),
        ({"running_var": _wire([1, -1, 1])}, errors.InvalidRequest, "running_var"),
        ({"num_batches_tracked": _wire([1.0])}, errors.DtypeMismatch, "num_batches_tracked"),
        ({"num_batches_tracked": _wire([1], torch.int64)}, errors.ShapeMismatch, "num_batches_tracked"),
        (
            {"num_batches_tracked": Tensor("int64", (), (-1).to_bytes(8, "little", signed=True))},
            errors.InvalidRequest,
            "num_batches_tracked",
        ),
    ],
)
def test_replacing_tensors_refuses_by_name(tensors: dict, error: type, field: str) -> None:
    with pytest.raises(error) as refused:
        replace_tensors(initial_state(CONFIG), tensors)
    assert refused.value.fields["field"] == field


def test_replaced_tensors_are_copies_so_that_a_reused_buffer_cannot_change_the_state() -> None:
    buffer = bytearray(_wire([1, 2, 3]).buffer)
    state = replace_tensors(initial_state(CONFIG), {"bias": Tensor("float32", (3,), buffer)})
    buffer[:] = bytes(12)
    assert torch.equal(state.bias, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_tensors_come_back_from_the_wire_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 100).to(dtype)
    back = to_torch(to_wire(tensor))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
