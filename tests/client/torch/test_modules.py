"""Remote modules against their torch twins: fed the same batches, everything is equal bit by bit."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm_client.torch import RemoteBatchNorm1d, RemoteBatchNorm2d, RemoteBatchNorm3d
from batchnorm_client.wire.errors import (
    DtypeMismatch,
    InvalidRequest,
    LayerExists,
    NonFinite,
    ShapeMismatch,
    TooFewValues,
)

TWINS = {
    (6, 3): (RemoteBatchNorm1d, nn.BatchNorm1d),
    (6, 3, 7): (RemoteBatchNorm1d, nn.BatchNorm1d),
    (6, 3, 4, 5): (RemoteBatchNorm2d, nn.BatchNorm2d),
    (4, 3, 2, 3, 4): (RemoteBatchNorm3d, nn.BatchNorm3d),
}
OPTIONS = {
    "defaults": {},
    "cumulative": {"momentum": None},
    "eps and momentum": {"eps": 1e-2, "momentum": 1 / 3},
    "not affine": {"affine": False},
    "without bias": {"bias": False},
    "untracked": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "float64": {"dtype": torch.float64},
}


def batch_of(shape, dtype=torch.float32):
    return (torch.randn(shape) * 3 + 1).to(dtype)


def assert_equal_states(remote, local, ulps=0):
    """Bit by bit, but for units in the last place of running_var that are allowed."""
    ours, theirs = remote.state_dict(), local.state_dict()
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        if ulps and name.endswith("running_var"):
            assert (ours[name].view(torch.int32) - theirs[name].view(torch.int32)).abs().max() <= ulps
        else:
            assert torch.equal(ours[name], theirs[name]), name


def step(module, batch, optimizer):
    """Output and gradients of one step; the loss has a gradient that differs everywhere."""
    batch = batch.clone().requires_grad_()
    output = module(batch)
    loss = (output.float().sin() * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum()
    module.zero_grad()
    loss.backward()
    found = [output.detach(), batch.grad, *(parameter.grad.clone() for parameter in module.parameters())]
    if optimizer:
        optimizer.step()
    return found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", TWINS, ids=str)
def test_training_is_equal_bit_by_bit(client, name, shape, options):
    ours, theirs = TWINS[shape]
    torch.manual_seed(0)
    remote, local = ours(3, client=client, name=name, **options), theirs(3, **options)
    parameters = list(remote.parameters())
    optimizers = [torch.optim.Adam(module.parameters(), 0.1) if parameters else None for module in (remote, local)]
    for _ in range(4):
        batch = batch_of(shape, options.get("dtype", torch.float32))
        for mine, torchs in zip(step(remote, batch, optimizers[0]), step(local, batch, optimizers[1]), strict=True):
            assert mine.dtype == torchs.dtype
            assert torch.equal(mine, torchs)
    assert_equal_states(remote, local)
    remote.eval()
    local.eval()
    batch = batch_of(shape, options.get("dtype", torch.float32))
    for mine, torchs in zip(step(remote, batch, None), step(local, batch, None), strict=True):
        assert torch.equal(mine, torchs)
    assert_equal_states(remote, local)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_steps_the_parameters_that_the_service_uses(client, name, optimizer):
    remote, local = RemoteBatchNorm1d(3, client=client, name=name), nn.BatchNorm1d(3)
    optimizers = [optimizer(module.parameters(), 0.1) for module in (remote, local)]
    for _ in range(5):
        batch = batch_of((8, 3))
        step(remote, batch, optimizers[0])
        step(local, batch, optimizers[1])
    assert torch.equal(remote.weight, local.weight)
    remote.push()
    layer = remote.layer.inspect()
    assert np.float32(layer.weight).tolist() == local.weight.tolist()
    assert np.float32(layer.bias).tolist() == local.bias.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}], ids=str)
def test_half_precision_input(client, name, dtype, options):
    remote, local = RemoteBatchNorm2d(3, client=client, name=name, **options), nn.BatchNorm2d(3, **options)
    for _ in range(3):
        batch = batch_of((6, 3, 4, 5), dtype)
        for mine, torchs in zip(step(remote, batch, None), step(local, batch, None), strict=True):
            assert mine.dtype == torchs.dtype
            if dtype == torch.bfloat16 and len(options) == 2:
                # With nothing in float32 around, torch rounds a bfloat16 batch's invstd in a way of its own.
                assert torch.allclose(mine, torchs, rtol=2**-6, atol=2**-6)
            else:
                assert torch.equal(mine, torchs)
    assert_equal_states(remote, local, ulps=3)  # one per fold: torch folds a variance that it has not rounded yet


@pytest.mark.parametrize(
    ("shape", "layout"), [((6, 3, 4, 5), torch.channels_last), ((4, 3, 2, 3, 4), torch.channels_last_3d)]
)
def test_channels_last_stay_channels_last(client, name, shape, layout):
    ours, theirs = TWINS[shape]
    remote, local = ours(3, client=client, name=name), theirs(3)
    batch = batch_of(shape).contiguous(memory_format=layout)
    for mine, torchs in zip(step(remote, batch, None), step(local, batch, None), strict=True):
        assert mine.stride() == torchs.stride()
        # The service sums in the order of the contiguous layout.
        assert torch.allclose(mine, torchs, rtol=1e-5, atol=1e-6)


def test_a_strided_input(client, name):
    remote, local = RemoteBatchNorm1d(3, client=client, name=name), nn.BatchNorm1d(3)
    batch = batch_of((3, 8)).T
    assert torch.allclose(remote(batch), local(batch), rtol=1e-5, atol=1e-6)


def test_it_is_its_torch_twin(client, name):
    remote = RemoteBatchNorm2d(3, client=client, name=name)
    assert isinstance(remote, nn.BatchNorm2d)
    assert not list(remote.buffers())
    assert repr(remote) == repr(nn.BatchNorm2d(3)).replace("BatchNorm", "RemoteBatchNorm")[:-1] + f", name='{name}')"
    nn.init.constant_(remote.weight, 2.0)
    assert remote(batch_of((6, 3, 2, 2))).std() > 1.5


def test_options_that_change_reach_the_service(client, name):
    remote, local = RemoteBatchNorm1d(3, client=client, name=name), nn.BatchNorm1d(3)
    for changes in ({"momentum": 0.5}, {"eps": 0.1}, {"track_running_stats": False}, {"momentum": None}, {}):
        for module in (remote, local):
            for option, value in changes.items():
                setattr(module, option, value)
        batch = batch_of((8, 3))
        assert torch.equal(remote(batch), local(batch))
    local.track_running_stats = remote.track_running_stats = True
    batch = batch_of((8, 3))
    remote(batch), local(batch)
    assert_equal_states(remote, local)


def test_nothing_is_sent_that_did_not_change(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name)
    before = remote.layer.inspect().version
    remote.eval()(batch_of((8, 3)))
    with torch.no_grad():
        remote.weight.mul_(1)
    remote(batch_of((8, 3)))
    assert remote.layer.inspect().version == before
    with torch.no_grad():
        remote.weight.mul_(2)
    remote(batch_of((8, 3)))
    assert remote.layer.inspect().version == before + 1


def test_running_statistics_are_the_services(client, name):
    remote, other = (RemoteBatchNorm1d(3, client=client, name=name) for _ in range(2))
    other(batch_of((8, 3)))
    assert remote.num_batches_tracked.item() == 1
    assert torch.equal(remote.running_mean, other.running_mean)
    remote.running_var = torch.full((3,), 4.0, dtype=torch.float64)
    remote.num_batches_tracked = torch.tensor(7)
    assert other.running_var.tolist() == [4, 4, 4]
    assert other.num_batches_tracked.item() == 7
    remote.reset_running_stats()
    assert_equal_states(other, nn.BatchNorm1d(3))
    with torch.no_grad():
        remote.bias.fill_(3)
    remote.reset_parameters()
    assert_equal_states(remote, nn.BatchNorm1d(3))
    remote.track_running_stats = False
    other(batch_of((8, 3)))
    remote.reset_running_stats()  # as torch's: not while tracking is off
    assert remote.num_batches_tracked.item() == 1


def test_a_layer_without_running_statistics_has_none(client, name):
    remote = RemoteBatchNorm1d(3, track_running_stats=False, client=client, name=name)
    assert (remote.running_mean, remote.running_var, remote.num_batches_tracked) == (None, None, None)
    with pytest.raises(ValueError, match="running_mean"):
        remote.running_mean = torch.zeros(3)
    remote.reset_running_stats()
    remote.track_running_stats = True  # torch ignores it, too
    assert torch.equal(remote(batch := batch_of((4, 3))), nn.BatchNorm1d(3)(batch))


def test_update_bn_of_swa_works_on_it(client, name):
    remote, local = (
        nn.Sequential(module) for module in (RemoteBatchNorm1d(3, client=client, name=name), nn.BatchNorm1d(3))
    )
    loader = [batch_of((8, 3)) for _ in range(4)]
    for model in (remote, local):
        model(batch_of((8, 3)))
        torch.optim.swa_utils.update_bn(loader, model)
    assert_equal_states(remote, local)
    assert remote[0].momentum == 0.1


def test_refused_as_torch_refuses(client, name):
    remote, local = RemoteBatchNorm2d(3, client=client, name=name), nn.BatchNorm2d(3)
    before = remote.layer.inspect().version
    for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5, 6), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match=r"(?i)expected") as torchs:
            local(torch.zeros(shape))
        with pytest.raises(ValueError, match=f"^{re.escape(str(torchs.value))}$"):
            remote(torch.zeros(shape))
    assert remote.layer.inspect().version == before


def test_refused_by_the_service(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name)
    for batch, error in (
        (torch.zeros(0, 3), TooFewValues),
        (torch.zeros(4, 5), ShapeMismatch),
        (torch.zeros(4, 3, dtype=torch.float64), DtypeMismatch),
        (torch.full((4, 3), torch.nan), NonFinite),
    ):
        with pytest.raises(error):
            remote(batch)
    assert remote.num_batches_tracked.item() == 0
    assert remote.eval()(torch.zeros(1, 3)).shape == (1, 3)


def test_non_finite_batches_can_be_allowed(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name, non_finite="allow")
    assert remote(torch.full((4, 3), torch.nan)).isnan().all()
    assert remote.running_mean.isnan().all()


def test_an_empty_batch_in_eval_mode(client, name):
    remote, local = RemoteBatchNorm1d(3, client=client, name=name).eval(), nn.BatchNorm1d(3).eval()
    for module in (remote, local):
        empty = torch.zeros(0, 3, requires_grad=True)
        module(empty).sum().backward()
        assert empty.grad.shape == (0, 3)
        assert module.weight.grad.tolist() == [0, 0, 0]


def test_bad_arguments(client, name):
    with pytest.raises(ValueError, match="'remote' or 'local', not 'lokal'"):
        RemoteBatchNorm1d(3, client=client, name=name, compute="lokal")
    with pytest.raises(ValueError, match="float16"):
        RemoteBatchNorm1d(3, dtype=torch.float16, client=client, name=name)
    with pytest.raises(InvalidRequest):
        RemoteBatchNorm1d(3, client=client, name="../" + name)
    with pytest.raises(InvalidRequest):
        RemoteBatchNorm1d(3, eps=0.0, client=client, name=name)
    RemoteBatchNorm1d(3, client=client, name=name)
    with pytest.raises(LayerExists):
        RemoteBatchNorm2d(3, client=client, name=name)
    with pytest.raises(LayerExists):
        RemoteBatchNorm1d(3, eps=1e-3, client=client, name=name)


def test_parameters_of_another_dtype_are_refused_before_anything_is_counted(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name).half()
    with pytest.raises(TypeError, match=r"weight is torch\.float16"):
        remote(batch_of((4, 3), torch.float16))
    assert remote.num_batches_tracked.item() == 0


def test_parameters_on_another_device_are_refused_before_anything_is_counted(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name)
    with pytest.raises(RuntimeError, match="the input is on meta"):
        remote(torch.zeros(4, 3, device="meta"))
    assert remote.num_batches_tracked.item() == 0
