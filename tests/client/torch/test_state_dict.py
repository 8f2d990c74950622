"""state_dict, both ways between remote modules and their torch twins."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from batchnorm_client.torch import RemoteBatchNorm1d, RemoteBatchNorm2d
from batchnorm_client.wire.errors import InvalidRequest


def trained(model, shape=(6, 3, 4, 4)):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    for _ in range(3):
        model(torch.randn(shape) * 2 + 1)
    return model


def models(client, name):
    """The same small net with remote and with local normalization."""
    remote = nn.Sequential(nn.Conv2d(3, 4, 3), RemoteBatchNorm2d(4, client=client, name=name), nn.ReLU())
    return remote, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def assert_same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)


def test_torch_loads_the_remote_modules_state(client, name):
    remote, local = models(client, name)
    trained(remote)
    file = io.BytesIO()
    torch.save(remote.state_dict(), file)
    file.seek(0)
    local.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same(remote, local)
    batch = torch.randn(2, 3, 8, 8)
    assert torch.equal(remote.eval()(batch), local.eval()(batch))


@pytest.mark.parametrize("assign", [False, True])
def test_the_remote_module_loads_torchs_state(client, name, assign):
    remote, local = models(client, name)
    trained(local)
    assert str(remote.load_state_dict(local.state_dict(), assign=assign)) == "<All keys matched successfully>"
    assert_same(remote, local)
    other = RemoteBatchNorm2d(4, client=client, name=name)  # everything is in the service, weight and bias too
    assert_same(other, local[1])
    batch = torch.randn(2, 3, 8, 8)
    assert torch.equal(remote.eval()(batch), local.eval()(batch))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"bias": False}], ids=str)
def test_what_the_config_leaves_out_is_left_out(client, name, options):
    remote, local = RemoteBatchNorm1d(3, client=client, name=name, **options), nn.BatchNorm1d(3, **options)
    trained(local, (5, 3))
    remote.load_state_dict(local.state_dict())
    assert_same(remote, local)
    local.load_state_dict(trained(remote, (5, 3)).state_dict())
    assert_same(remote, local)


def test_a_state_that_does_not_fit_is_refused_as_in_torch_and_changes_nothing_in_the_service(client, name):
    remote = trained(RemoteBatchNorm1d(3, client=client, name=name), (5, 3))
    before = remote.layer.inspect()
    good = nn.BatchNorm1d(3).state_dict()
    for bad in (
        nn.BatchNorm1d(4).state_dict(),
        good | {"running_var": "text"},
        good | {"weight": torch.zeros(2)},
    ):
        with pytest.raises(RuntimeError) as ours:
            remote.load_state_dict(bad)
        with pytest.raises(RuntimeError) as theirs:
            nn.BatchNorm1d(3).load_state_dict(bad)
        assert str(ours.value) == str(theirs.value).replace("BatchNorm1d", "RemoteBatchNorm1d")
    after = remote.layer.inspect()
    assert (after.running_mean, after.num_batches_tracked) == (before.running_mean, before.num_batches_tracked)


def test_keys_that_are_missing_or_too_many_are_named_and_the_rest_is_loaded_as_in_torch(client, name):
    remote, local = RemoteBatchNorm1d(3, client=client, name=name), nn.BatchNorm1d(3)
    state = trained(nn.BatchNorm1d(3), (5, 3)).state_dict() | {"surplus": torch.zeros(3)}
    del state["running_mean"]
    for module in (remote, local):
        with pytest.raises(RuntimeError, match=r'(?s)Missing.*"running_mean".*Unexpected.*"surplus"'):
            module.load_state_dict(state)
    assert_same(remote, local)


def test_a_state_that_the_service_refuses(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name)
    with pytest.raises(InvalidRequest, match="num_batches_tracked"):
        remote.load_state_dict(nn.BatchNorm1d(3).state_dict() | {"num_batches_tracked": torch.tensor(-1)})
    assert remote.num_batches_tracked.item() == 0


def test_a_part_of_a_state(client, name):
    remote = trained(RemoteBatchNorm1d(3, client=client, name=name), (5, 3))
    part = {"running_mean": torch.tensor([1.0, 2.0, 3.0]), "surplus": torch.zeros(1)}
    assert remote.load_state_dict(part, strict=False) == nn.BatchNorm1d(3).load_state_dict(part, strict=False)
    assert remote.running_mean.tolist() == [1, 2, 3]
    assert remote.num_batches_tracked.item() == 3


def test_a_state_from_before_torch_counted_batches(client, name):
    remote = trained(RemoteBatchNorm1d(3, client=client, name=name), (5, 3))
    old = nn.BatchNorm1d(3).state_dict()
    del old["num_batches_tracked"], old._metadata
    remote.load_state_dict(old)
    assert remote.num_batches_tracked.item() == 3
    assert remote.running_mean.tolist() == [0, 0, 0]


def test_a_float64_state_is_loaded_into_a_float32_layer(client, name):
    remote, local = RemoteBatchNorm1d(3, client=client, name=name), trained(nn.BatchNorm1d(3), (5, 3))
    remote.load_state_dict(copy.deepcopy(local).double().state_dict())
    assert_same(remote, local)


def test_no_copies_and_no_pickles(client, name):
    remote, _ = models(client, name)
    for attempt in (copy.deepcopy, pickle.dumps, lambda model: copy.copy(model[1])):
        with pytest.raises(
            TypeError,
            match=r"RemoteBatchNorm2d cannot be copied or pickled.*batchnorm_client\.torch\.snapshot\(model\)",
        ):
            attempt(remote)
