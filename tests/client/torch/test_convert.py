"""Whole models into the service and back."""

import copy

import pytest
import torch
from torch import nn

from batchnorm_client.torch import (
    RemoteBatchNorm,
    RemoteBatchNorm1d,
    RemoteBatchNorm2d,
    RemoteBatchNorm3d,
    convert_batchnorm,
    revert,
)
from batchnorm_client.wire.errors import InvalidRequest, LayerExists


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU())
        self.blocks = nn.ModuleList(nn.ModuleDict({"bn1": nn.BatchNorm2d(4, eps=1e-3)}) for _ in range(2))
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block["bn1"](x)
        return self.head(x)


def net():
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(4, 1, 6, 6))
    return model


def steps(model, optimizer, count=3):
    """Losses of some steps of training on the same batches."""
    batches, losses = torch.Generator().manual_seed(1), []
    for _ in range(count):
        x = torch.randn((8, 1, 6, 6), generator=batches)
        loss = nn.functional.cross_entropy(model(x), torch.arange(8) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_there_and_back_with_training_in_between(client, name):
    local, model = net(), net()
    optimizers = [torch.optim.Adam(found.parameters(), 0.01) for found in (local, model)]  # made before the conversion
    steps(local, optimizers[0])
    steps(model, optimizers[1])
    parameters = list(model.parameters())
    assert convert_batchnorm(model, client, prefix=name) is model
    assert all(mine is before for mine, before in zip(model.parameters(), parameters, strict=True))
    names = ["stem.1", "blocks.0.bn1", "blocks.1.bn1", "head.2"]
    assert [found.name for found in model.modules() if isinstance(found, RemoteBatchNorm)] == [name + n for n in names]
    assert sorted(layer.name for layer in client.layers(prefix=name)) == sorted(name + n for n in names)
    assert_same(model, local)
    assert steps(model, optimizers[1]) == steps(local, optimizers[0])
    assert_same(model, local)
    assert revert(model) is model
    assert [type(found) for found in model.modules()] == [type(found) for found in local.modules()]
    assert all(mine is before for mine, before in zip(model.parameters(), parameters, strict=True))
    assert_same(model, local)
    assert str(model) == str(local)
    assert steps(model, optimizers[1]) == steps(local, optimizers[0])  # the same again, without the service
    assert_same(model, local)
    copy.deepcopy(model)


@pytest.mark.parametrize(
    ("local", "remote", "shape"),
    [
        (nn.BatchNorm1d(3), RemoteBatchNorm1d, (4, 3)),
        (nn.BatchNorm2d(3, track_running_stats=False), RemoteBatchNorm2d, (4, 3, 2, 2)),
        (nn.BatchNorm3d(3, bias=False), RemoteBatchNorm3d, (4, 3, 2, 2, 2)),
        (nn.BatchNorm1d(3, affine=False, track_running_stats=False), RemoteBatchNorm1d, (4, 3)),
        (nn.BatchNorm1d(3, dtype=torch.float64, momentum=0.5), RemoteBatchNorm1d, (4, 3)),
    ],
    ids=str,
)
def test_a_model_that_is_a_batch_normalization(client, name, local, remote, shape):
    batch = torch.randn(shape, dtype=torch.float64 if local.weight is not None else None)
    batch = batch.to(torch.float32 if local.weight is None else local.weight.dtype)
    local(batch)
    model = convert_batchnorm(copy.deepcopy(local).eval(), client, prefix=name)
    assert type(model) is remote
    assert (model.name, model.training) == (name, False)
    assert_same(model, local)
    back = revert(model)
    assert (type(back), back.training) == (type(local), False)
    assert str(back) == str(local)
    assert_same(back, local)
    assert torch.equal(back.train()(batch), local(batch))


def test_tracking_that_was_turned_off_stays_off(client, name):
    local = nn.BatchNorm1d(3)
    local(torch.randn(4, 3))
    local.track_running_stats = False
    model = convert_batchnorm(copy.deepcopy(local), client, prefix=name)
    assert model.layer.inspect().config.track_running_stats is False
    model(torch.randn(4, 3))
    assert_same(model, local)
    assert revert(model).track_running_stats is False


def test_a_module_in_two_places_is_one_layer(client, name):
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Linear(3, 3), shared, nn.ModuleDict({"again": nn.Sequential(shared)}))
    convert_batchnorm(model, client, prefix=name)
    assert model[0] is model[2] is model[3]["again"][0]
    assert model[0].name == name + "0"
    assert len(list(client.layers(prefix=name))) == 1
    revert(model)
    assert type(model[0]) is nn.BatchNorm1d
    assert model[0] is model[2] is model[3]["again"][0]


def test_converting_twice_changes_nothing(client, name):
    model = convert_batchnorm(net(), client, prefix=name)
    before = dict(model.named_modules())
    convert_batchnorm(model, client, prefix="another." + name)
    assert dict(model.named_modules()) == before
    assert revert(nn.Linear(2, 2))


class Custom(nn.BatchNorm2d):
    """Does more than a layer of the service."""


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.SyncBatchNorm(3), r"SyncBatchNorm at '1\.0' cannot be converted: .*start from"),
        (nn.LazyBatchNorm2d(), r"LazyBatchNorm2d at '1\.0' cannot be converted: .*run a batch"),
        (Custom(3), r"Custom at '1\.0' cannot be converted$"),
        (nn.BatchNorm2d(3).half(), r"BatchNorm2d at '1\.0' is torch\.float16"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_converted_is_named_and_nothing_is_changed(client, name, module, message):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(module))
    with pytest.raises(TypeError, match=message):
        convert_batchnorm(model, client, prefix=name)
    assert type(model[0]) is nn.BatchNorm2d
    assert not list(client.layers(prefix=name))


def test_bad_names_change_nothing(client, name):
    for model, prefix in ((nn.BatchNorm1d(3), ""), (nn.Sequential(nn.BatchNorm1d(3)), "no spaces ")):
        with pytest.raises(InvalidRequest):
            convert_batchnorm(model, client, prefix=prefix)


def test_a_layer_with_another_config_leaves_the_model_as_it_is(client, name):
    client.create_layer(name + "1", 99)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with pytest.raises(LayerExists):
        convert_batchnorm(model, client, prefix=name)
    assert [type(found) for found in model] == [nn.BatchNorm1d] * 2
