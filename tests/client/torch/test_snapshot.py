"""Copies of models that have nothing to do with the service: for target networks, averages and checkpoints."""

import copy
import io
import pickle

import httpx
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchnorm_client import Client
from batchnorm_client.torch import (
    RemoteBatchNorm,
    RemoteBatchNorm1d,
    RemoteBatchNorm2d,
    convert_batchnorm,
    flush,
    revert,
    snapshot,
)
from client.harness import NOW, Way
from client.torch.test_convert import assert_same, net, steps


def trained(client, name, **options):
    model = convert_batchnorm(net(), client, name, **options)
    steps(model, torch.optim.Adam(model.parameters(), 0.01))
    return model


def deep(model):
    """All modules, parameters and buffers."""
    return {id(found) for found in (*model.modules(), *model.parameters(), *model.buffers())}


@pytest.mark.parametrize("compute", ["remote", "local"])
def test_a_copy_with_torchs_modules_and_the_state_of_now(client, name, compute):
    model = trained(client, name, compute=compute)
    model.head.eval()
    model.stem[1].bias.requires_grad_(False)
    before = {layer.name: layer.version for layer in client.layers(name)}
    found = snapshot(model)
    assert not deep(found) & deep(model)
    assert {layer.name: layer.version for layer in client.layers(name)} == before
    assert all(isinstance(model.get_submodule(place), RemoteBatchNorm) for place in ("stem.1", "head.2"))
    assert_same(found, model)
    assert [module.training for module in found.modules()] == [module.training for module in model.modules()]
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(found.state_dict())
    steps(model, torch.optim.Adam(model.parameters(), 0.01))
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    reverted = revert(model)
    assert [type(module) for module in found.modules()] == [type(module) for module in reverted.modules()]
    assert str(found) == str(reverted)


@pytest.mark.parametrize("compute", ["remote", "local"])
def test_it_is_copied_and_pickled_and_works_when_the_service_is_gone(url, name, compute):
    x = torch.randn(8, 1, 6, 6)
    with Client(url) as client:
        model = trained(client, name, compute=compute).eval()
        expected = model(x)
        found = snapshot(model)
    assert torch.equal(found(x), expected)
    assert torch.equal(copy.deepcopy(found)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(found))(x), expected)
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    found.train()(x)
    assert found.stem[1].num_batches_tracked.item() == 5  # the one of `net`, three steps, and this one


def test_moments_that_wait_are_in_it(client, name):
    model = convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), client, name, compute="local")
    model[0](torch.randn(8, 3))  # by itself: nobody has sent its moments yet
    found = snapshot(model)
    assert found[0].num_batches_tracked.item() == 1
    assert not found._forward_hooks
    assert not found._forward_pre_hooks
    assert not found._forward_hooks_always_called
    hooks = model._forward_hooks, model._forward_pre_hooks
    assert all(hooks)
    model(torch.randn(8, 3))
    assert model[0].layer.inspect().num_batches_tracked == 2


def test_one_read_for_each_layer(url, name):
    way = Way(url)
    http = httpx.Client(transport=httpx.MockTransport(way), base_url="http://service")
    with http, Client(http=http, retry=NOW) as client:
        model = trained(client, name, compute="local")
        flush(model)
        way.sent.clear()
        snapshot(model)
        remotes = [found for found in model.modules() if isinstance(found, RemoteBatchNorm)]
        assert way.sent == [f"GET {remote.name}" for remote in remotes]
    way.close()


def test_what_was_changed_here_and_not_sent_is_copied_and_so_is_what_others_changed(client, name):
    mine = RemoteBatchNorm1d(3, client=client, name=name, compute="local")
    nn.init.constant_(mine.weight, 2)
    mine.momentum = 0.5
    other = client.layer(name)
    other.update(bias=[3.0, 3.0, 3.0], eps=0.25)
    found = snapshot(mine)
    assert type(found) is nn.BatchNorm1d
    assert (found.weight.tolist(), found.bias.tolist()) == ([2, 2, 2], [3, 3, 3])
    assert (found.eps, found.momentum) == (0.25, 0.5)
    assert (mine.weight.tolist(), mine.bias.tolist(), mine.eps) == ([2, 2, 2], [0, 0, 0], 1e-5)
    assert other.inspect().weight == [1, 1, 1]
    x = torch.randn(8, 3)
    assert torch.equal(found.eval()(x), mine.eval()(x))


def test_modules_and_parameters_in_two_places_stay_one(client, name):
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Linear(3, 3), shared, nn.ModuleDict({"again": nn.Sequential(shared)}))
    model.tied = shared.weight
    model.norms = [shared]
    convert_batchnorm(model, client, name)
    model.norms = [model[0]]
    found = snapshot(model)
    assert type(found[0]) is nn.BatchNorm1d
    assert found[0] is found[2] is found[3]["again"][0] is found.norms[0]
    assert found.tied is found[0].weight
    assert found.tied is not model.tied


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(3, affine=False), (4, 3)),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2)),
        (lambda: nn.BatchNorm3d(3, bias=False), (4, 3, 2, 2, 2)),
        (lambda: nn.BatchNorm1d(3, affine=False, track_running_stats=False), (4, 3)),
        (lambda: nn.BatchNorm1d(3, dtype=torch.float64, momentum=None), (4, 3)),
    ],
    ids=["not affine", "untracked", "without bias", "neither", "float64"],
)
def test_every_kind_of_module(client, name, make, shape):
    local = make()
    batch = torch.randn(shape, dtype=torch.float64 if name.count("float64") else torch.float32)
    remote = convert_batchnorm(copy.deepcopy(local), client, name)
    remote(batch)
    local(batch)
    found = snapshot(remote)
    assert type(found) is type(local)
    assert str(found) == str(local)
    assert_same(found, local)
    assert [value.dtype for value in found.state_dict().values()] == [v.dtype for v in local.state_dict().values()]


def test_tracking_that_was_turned_off_stays_off(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name)
    remote.track_running_stats = False
    found = snapshot(remote)
    assert found.track_running_stats is False
    assert found.running_mean is not None


def test_a_device_is_kept(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name, affine=False, device="meta")
    assert {buffer.device.type for buffer in snapshot(remote).buffers()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_kept(client, name):
    remote = RemoteBatchNorm2d(3, client=client, name=name, device="cuda")
    remote(torch.randn(4, 3, 2, 2, device="cuda"))
    found = snapshot(remote)
    assert {tensor.device.type for tensor in (*found.parameters(), *found.buffers())} == {"cuda"}
    assert_same(found, remote)


def test_a_bias_that_the_module_has_not_is_not_thrown_away(client, name):
    remote = RemoteBatchNorm1d(3, bias=False, client=client, name=name)
    client.layer(name).update(bias=[1.0, 1.0, 1.0])
    for copying in (snapshot, revert):
        with pytest.raises(ValueError, match="has a bias other than 0"):
            copying(remote)


def test_a_model_without_remote_modules_is_copied_as_it_is(client, name):
    model = net()
    found = snapshot(model)
    assert_same(found, model)
    assert not deep(found) & deep(model)


def test_target_networks_and_moving_averages(client, name):
    """A target network as in DQN and SAC, and torch's own average of weights."""
    online = trained(client, name)
    target, average = snapshot(online), AveragedModel(snapshot(online), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    start = [parameter.detach().clone() for parameter in average.parameters()]
    average.update_parameters(snapshot(online))  # it copies buffers, too
    steps(online, torch.optim.Adam(online.parameters(), 0.01))
    target.load_state_dict(online.state_dict())
    assert_same(target, online)
    average.update_parameters(snapshot(online))
    for mean, first, last in zip(average.parameters(), start, online.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.9 * first + 0.1 * last)
    for name_, value in online.state_dict().items():
        if name_.endswith(("running_mean", "running_var")):
            assert torch.equal(average.module.state_dict()[name_], value)
