"""Modules that fold a batch and then normalize it with the running statistics, as observations are normalized."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm

from batchnorm_client import InvalidRequest, LayerExists, TooFewValues
from batchnorm_client.torch import RemoteBatchNorm1d, RemoteBatchNorm2d, convert_batchnorm, snapshot
from client.torch.test_modules import assert_equal_states


def observed(local, x):
    """torch's module folds the batch, and normalizes it with what it has then."""
    with torch.no_grad():
        local.train()(x)
    return batch_norm(x, local.running_mean, local.running_var, local.weight, local.bias, False, 0.0, local.eps)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"bias": False}], ids=str)
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 2)], ids=str)
def test_outputs_gradients_and_statistics_are_torchs(client, name, shape, options):
    ours, theirs = (RemoteBatchNorm1d, nn.BatchNorm1d) if len(shape) == 2 else (RemoteBatchNorm2d, nn.BatchNorm2d)
    torch.manual_seed(0)
    remote, local = ours(3, client=client, name=name, normalize="running", **options), theirs(3, **options)
    modules = (remote, local)
    optimizers = [torch.optim.Adam(found.parameters(), 0.1) for found in modules if list(found.parameters())]
    for step in range(4):
        batch = torch.randn(shape) * (1 + step) + step
        mine, torchs = (batch.clone().requires_grad_() for _ in modules)
        output, expected = remote(mine), observed(local, torchs)
        assert torch.equal(output, expected)
        output.sin().sum().backward()
        expected.sin().sum().backward()
        assert torch.equal(mine.grad, torchs.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_states(remote, local)
    x = torch.randn(shape)
    assert torch.equal(remote.eval()(x), local.eval()(x))
    assert_equal_states(remote, local)


def test_observations_one_at_a_time_have_the_statistics_of_all(client, name):
    options = {"affine": False, "statistics": "population", "normalize": "running"}
    remote = RemoteBatchNorm1d(3, eps=1e-8, client=client, name=name, **options)
    assert remote.momentum is None
    seen = np.random.default_rng(0).normal([1, 100, -5], [1, 0.5, 20], (50, 3)).astype(np.float32)
    for count in range(1, len(seen) + 1):
        output = remote(torch.from_numpy(seen[count - 1 : count]))
        past = seen[:count].astype(np.float64)
        var = past.var(0, ddof=1) if count > 1 else np.ones(3)
        expected = (seen[count - 1] - past.mean(0)) / np.sqrt(var + 1e-8)
        np.testing.assert_allclose(output[0], expected, rtol=1e-4, atol=1e-3)
    kept = client.layer(name).inspect()
    assert (kept.num_batches_tracked, kept.samples_tracked) == (50, 50)
    remote.eval()
    remote(torch.from_numpy(seen))
    assert client.layer(name).inspect() == kept


def test_others_who_fold_are_seen(client, name):
    options = {"statistics": "population", "normalize": "running", "affine": False, "client": client, "name": name}
    actors = [RemoteBatchNorm1d(2, **options) for _ in range(3)]
    batches = torch.randn(6, 4, 2)
    for number, batch in enumerate(batches):
        output = actors[number % 3](batch)
    past = batches.reshape(-1, 2).double()
    expected = (batches[-1] - past.mean(0)) / torch.sqrt(past.var(0) + 1e-5)
    torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-6)


def test_too_few_values_for_moving_statistics(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name, normalize="running")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        remote(torch.zeros(1, 3))
    with pytest.raises(TooFewValues):
        remote(torch.zeros(0, 3))
    assert remote.num_batches_tracked == 0
    remote.track_running_stats = False
    with pytest.raises(InvalidRequest, match="tracks none"):
        remote(torch.zeros(4, 3))


def test_a_population_layer_in_torchs_way(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name, statistics="population", compute="local")
    batches = [torch.randn(5, 3) + number for number in range(3)]
    for batch in batches:
        torch.testing.assert_close(remote(batch), nn.BatchNorm1d(3)(batch))
    torch.testing.assert_close(remote.running_var, torch.cat(batches).var(0))
    assert torch.equal(remote(torch.ones(1, 3)), torch.zeros(1, 3))  # its bias: one value per channel


def test_checkpoints_of_population_statistics(client, name):
    model = nn.Sequential(
        RemoteBatchNorm1d(3, client=client, name=f"{name}a", statistics="population"), nn.Linear(3, 2)
    )
    model(torch.randn(5, 3))
    checkpoint = copy.deepcopy(model.state_dict())
    assert checkpoint["0.population_mean"].dtype == torch.float64
    model(torch.randn(5, 3) * 9)
    assert model[0].num_batches_tracked == 2
    other = nn.Sequential(
        RemoteBatchNorm1d(3, client=client, name=f"{name}b", statistics="population"), nn.Linear(3, 2)
    )
    for found in (model, other):
        assert found.load_state_dict(checkpoint) == nn.Module().load_state_dict({})
        assert {key: value.tolist() for key, value in found.state_dict().items()} == {
            key: value.tolist() for key, value in checkpoint.items()
        }
    x = torch.randn(4, 3)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert torch.equal(snapshot(model)(x), model(x))
    frozen = RemoteBatchNorm1d(3, client=client, name=f"{name}a", at=model[0].layer.pin("then").tag)
    frozen.load_state_dict(model[0].state_dict())
    model[0].train()(x)
    with pytest.raises(ValueError, match="population_mean"):
        frozen.load_state_dict(model[0].state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "running", "compute": "local"},
        {"normalize": "running", "group": "g", "group_size": 2},
        {"normalize": "running", "track_running_stats": False},
        {"normalize": "layer"},
        {"statistics": "median"},
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_before_a_layer_is_made(client, name, options):
    with pytest.raises(ValueError, match=r"running|layer|median"):
        RemoteBatchNorm1d(3, client=client, name=name, **options)
    assert list(client.layers(name)) == []


def test_another_kind_of_statistics_than_the_layer_has(client, name):
    RemoteBatchNorm1d(3, client=client, name=name)
    with pytest.raises(LayerExists):
        RemoteBatchNorm1d(3, client=client, name=name, statistics="population")


def test_a_converted_model(client, name):
    torch.manual_seed(0)
    local = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    model = convert_batchnorm(copy.deepcopy(local), client, name, normalize="running")
    assert "normalize='running'" in repr(model[0])
    for _ in range(3):
        x = torch.randn(6, 3) + 2
        assert torch.equal(model(x), observed(local[2], local[1](observed(local[0], x))))
