"""Converting a model onto layers that exist already: in silence only where nothing can be lost."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import pytest
import torch
from torch import nn

from batchnorm_client import Client, LayerExists, RemoteLayer
from batchnorm_client.torch import RemoteBatchNorm, convert_batchnorm
from client.harness import NOW, Way
from client.torch.test_convert import assert_same, net, steps


def filled(value, batches=0):
    """A module all of whose tensors have one value."""
    module = nn.BatchNorm1d(3)
    state = {name: torch.full_like(tensor, value) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state | {"num_batches_tracked": torch.tensor(batches)})
    return module


def versions(client, name):
    return {layer.name: layer.version for layer in client.layers(name)}


def remotes(model):
    return [found for found in model.modules() if isinstance(found, RemoteBatchNorm)]


@pytest.fixture
def used(client, name):
    """A net that was trained in the service."""
    model = convert_batchnorm(net(), client, name)
    steps(model, torch.optim.SGD(model.parameters(), 0.1))
    for remote in remotes(model):
        remote.push()
    return model


def test_a_prefix_is_needed(client, name):
    """Without one, two models shared their layers."""
    with pytest.raises(TypeError, match="prefix"):
        convert_batchnorm(nn.BatchNorm1d(3), client)
    model = nn.Sequential()
    model.add_module(name.replace(".", "-"), nn.BatchNorm1d(3))
    convert_batchnorm(model, client, "")
    assert [remote.name for remote in remotes(model)] == [name.replace(".", "-")]


def test_layers_that_were_used_are_not_taken_in_silence(client, name, used):
    """Pretrained weights of 7.0 became 1.0, because the prefix had been used by another model."""
    before = versions(client, name)
    model = net()
    model.more = nn.BatchNorm1d(3)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(LayerExists, match=r'existing="adopt".*existing="overwrite"') as raised:
        convert_batchnorm(model, client, name)
    assert "and 3 more" in str(raised.value)
    assert raised.value.fields["layers"] == [remote.name for remote in remotes(used)]
    assert versions(client, name) == before
    assert not remotes(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_adopt_takes_the_layers_state(client, name, used):
    model = net()
    parameters = list(model.parameters())
    before = versions(client, name)
    convert_batchnorm(model, client, name, existing="adopt")
    assert versions(client, name) == before
    assert all(mine is earlier for mine, earlier in zip(model.parameters(), parameters, strict=True))
    theirs = used.state_dict()
    for key, value in model.state_dict().items():
        if key.startswith(("stem.1.", "blocks.", "head.2.")):
            assert torch.equal(value, theirs[key]), key


@pytest.mark.usefixtures("used")
def test_overwrite_writes_the_models_state_and_counters(client, name):
    local = net()
    model = convert_batchnorm(copy.deepcopy(local), client, name, existing="overwrite")
    assert_same(model, local)
    assert {remote.layer.inspect().samples_tracked for remote in remotes(model)} == {0}
    optimizers = [torch.optim.SGD(found.parameters(), 0.1) for found in (model, local)]
    assert steps(model, optimizers[0]) == steps(local, optimizers[1])
    assert_same(model, local)


@pytest.mark.parametrize("existing", ["error", "adopt", "overwrite"])
@pytest.mark.parametrize(
    ("state", "is_used"),
    [
        ({}, False),
        ({"running_mean": torch.full((3,), 7.0)}, False),
        (filled(7.0).state_dict(), False),
        ({"running_mean": torch.tensor([7.0, 7.0, 6.0])}, True),
        ({"bias": torch.ones(3)}, True),
        ({"num_batches_tracked": torch.tensor(1)}, True),
        (filled(7.0, batches=1).state_dict(), True),
    ],
    ids=[
        "initial",
        "the module's in part",
        "the module's",
        "another mean",
        "another bias",
        "a batch",
        "all and a batch",
    ],
)
def test_what_makes_a_layer_used(client, name, existing, state, is_used):
    layer = client.create_layer(name, 3, dimensions=1)
    if state:
        layer.load_state_dict(state)
    module, theirs = filled(7.0), nn.BatchNorm1d(3)
    theirs.load_state_dict(layer.state_dict(as_torch=True))
    before = layer.inspect().version
    if is_used and existing == "error":
        with pytest.raises(LayerExists):
            convert_batchnorm(module, client, name)
        assert layer.inspect().version == before
        return
    remote = convert_batchnorm(module, client, name, existing=existing)
    assert_same(remote, theirs if is_used and existing == "adopt" else filled(7.0))


def test_an_unused_layer_gets_the_modules_options_too(client, name):
    layer = client.create_layer(name, 3, dimensions=1)
    layer.update(eps=0.5, momentum=None, non_finite="allow", clip=1.0, track_running_stats=False)
    convert_batchnorm(filled(7.0), client, name)
    config = layer.inspect().config
    assert (config.eps, config.momentum, config.non_finite, config.clip) == (1e-5, 0.1, "reject", None)
    assert config.track_running_stats


@pytest.mark.parametrize("theirs", [True, False])
@pytest.mark.parametrize("ours", [True, False])
def test_overwrite_of_a_layer_whose_tracking_is_off(client, name, ours, theirs):
    layer = client.create_layer(name, 3, dimensions=1)
    layer.train(torch.randn(4, 3))
    layer.update(track_running_stats=theirs)
    module = filled(7.0, batches=5)
    module.track_running_stats = ours
    remote = convert_batchnorm(module, client, name, existing="overwrite")
    assert remote.track_running_stats is ours
    assert_same(remote, filled(7.0, batches=5))
    found = layer.inspect()
    assert (found.samples_tracked, found.config.track_running_stats) == (0, ours)


@pytest.mark.parametrize("existing", ["error", "adopt", "overwrite"])
def test_all_layers_are_looked_at_before_any_is_written(client, name, existing):
    """The last one was created with another config, the one before it was used."""
    client.create_layer(name + "1", 3, dimensions=1).train(torch.randn(4, 3))
    client.create_layer(name + "2", 99)
    before = versions(client, name)
    model = nn.Sequential(filled(7.0), filled(7.0), filled(7.0))
    with pytest.raises(LayerExists):
        convert_batchnorm(model, client, name, existing=existing)
    assert versions(client, name) == before
    assert not remotes(model)


def test_a_module_without_bias(client, name):
    layer = client.create_layer(name + "1", 3, dimensions=1)
    layer.load_state_dict({"bias": torch.ones(3)})
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, bias=False))
    before = versions(client, name)
    for existing, error in (("error", LayerExists), ("adopt", ValueError)):
        with pytest.raises(error):
            convert_batchnorm(model, client, name, existing=existing)
        assert versions(client, name) == before
    convert_batchnorm(model, client, name, existing="overwrite")
    assert layer.inspect().bias == [0, 0, 0]


def test_an_unknown_choice_is_refused(client, name):
    with pytest.raises(ValueError, match="'error', 'adopt' or 'overwrite', not 'replace'"):
        convert_batchnorm(nn.BatchNorm1d(3), client, name, existing="replace")
    assert not versions(client, name)


@pytest.mark.parametrize("existing", ["error", "adopt", "overwrite"])
def test_somebody_else_is_faster(client, name, monkeypatch, existing):
    """Between creating a layer and giving it a state, another worker does both, and trains it."""
    local = filled(7.0, batches=1)
    first, load = copy.deepcopy(local), RemoteLayer.load_state_dict

    def late(*arguments, **options):
        monkeypatch.undo()
        convert_batchnorm(first, client, name)(torch.randn(4, 3))
        return load(*arguments, **options)

    monkeypatch.setattr(RemoteLayer, "load_state_dict", late)
    if existing == "error":
        with pytest.raises(LayerExists):
            convert_batchnorm(local, client, name)
        return
    remote = convert_batchnorm(local, client, name, existing=existing)
    assert remote.num_batches_tracked.item() == {"adopt": 2, "overwrite": 1}[existing]
    assert remote.layer.inspect().samples_tracked == {"adopt": 4, "overwrite": 0}[existing]


def test_data_parallel_workers_that_start_together(url, name):
    with ThreadPoolExecutor(4) as pool, Client(url, retry=NOW) as client:
        models = [nn.Sequential(filled(7.0, batches=3), filled(7.0, batches=3)) for _ in range(4)]
        list(pool.map(lambda model: convert_batchnorm(model, client, name, existing="adopt"), models))
        for model in models:
            assert_same(model, nn.Sequential(filled(7.0, batches=3), filled(7.0, batches=3)))


@pytest.mark.parametrize("lost", range(8))  # find, compare, reset, PATCH, PUT state; create, pull; state_dict
def test_an_answer_that_is_lost_on_the_way(url, client, name, lost):
    layer = client.create_layer(name, 3, dimensions=1)
    layer.train(torch.randn(4, 3))
    layer.update(eps=0.5)
    way = Way(url)
    http = httpx.Client(transport=httpx.MockTransport(way), base_url="http://service")
    with closing(way), http, Client(http=http, retry=NOW) as shaky:
        way.faults = [None] * lost + ["unheard"]
        remote = convert_batchnorm(filled(7.0, batches=3), shaky, name, existing="overwrite")
        assert_same(remote, filled(7.0, batches=3))
        assert not way.faults
    assert (layer.inspect().config.eps, layer.inspect().samples_tracked) == (1e-5, 0)
