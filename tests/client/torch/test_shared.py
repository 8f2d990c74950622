"""Several modules on one layer: a trainer and predictors, or several trainers."""

import pytest
import torch
from torch import nn

from batchnorm_client.torch import RemoteBatchNorm1d, RemoteBatchNorm2d


def test_a_predictor_sees_what_the_trainer_learned(client, name):
    trainer, predictor = (nn.Sequential(RemoteBatchNorm1d(3, client=client, name=name)) for _ in range(2))
    predictor.eval()
    optimizer = torch.optim.SGD(trainer.parameters(), 0.1)
    batch = torch.randn(8, 3)
    for _ in range(3):
        optimizer.zero_grad()
        (trainer(batch).sin() * torch.arange(3)).sum().backward()
        optimizer.step()
    trainer[0].push()
    trainer.eval()
    assert torch.equal(predictor(batch), trainer(batch))  # by the service's weight: the predictor's own was not changed
    assert predictor[0].weight.tolist() == [1, 1, 1]
    predictor[0].pull()
    assert torch.equal(predictor[0].weight, trainer[0].weight)
    version = trainer[0].layer.inspect().version
    assert torch.equal(predictor(batch), trainer(batch))
    assert trainer[0].layer.inspect().version == version


def test_two_models_train_one_layer(client, name):
    """Every batch counts, in the order in which they came; weight and bias are each model's own affair here: none."""
    torch.manual_seed(0)
    first, second = (
        nn.Sequential(nn.Conv2d(1, 2, 3), RemoteBatchNorm2d(2, affine=False, client=client, name=name))
        for _ in range(2)
    )
    twin = nn.BatchNorm2d(2, affine=False)
    for turn in range(6):
        model = (first, second)[turn % 2]
        batch = torch.randn(4, 1, 5, 5) + turn
        assert torch.equal(model(batch), twin(model[0](batch)))
    for name_, value in twin.state_dict().items():
        assert torch.equal(first.state_dict()["1." + name_], value)
        assert torch.equal(second.state_dict()["1." + name_], value)


def test_options_are_adopted_by_who_comes_later(client, name):
    first = RemoteBatchNorm1d(3, client=client, name=name)
    first.momentum, first.eps, first.track_running_stats = None, 0.5, False
    first.push()
    second = RemoteBatchNorm1d(3, client=client, name=name)
    assert (second.momentum, second.eps, second.track_running_stats) == (None, 0.5, False)


def test_a_bias_that_the_layer_has_is_not_thrown_away(client, name):
    first = RemoteBatchNorm1d(3, client=client, name=name)
    assert RemoteBatchNorm1d(3, bias=False, client=client, name=name).bias is None
    nn.init.ones_(first.bias)
    first.push()
    with pytest.raises(ValueError, match="has a bias other than 0"):
        RemoteBatchNorm1d(3, bias=False, client=client, name=name)


def test_after_a_failed_push_everything_is_sent_again(client, name, monkeypatch):
    """Whether the failed call took effect is unknown, and so is whether the old values are still there."""
    remote = RemoteBatchNorm1d(3, client=client, name=name)
    update = remote.layer.update

    def lost(**changes):
        update(**changes)
        raise ConnectionError

    monkeypatch.setattr(remote.layer, "update", lost)
    nn.init.constant_(remote.weight, 2)
    with pytest.raises(ConnectionError):
        remote.push()
    monkeypatch.undo()
    nn.init.constant_(remote.weight, 1)
    remote.push()
    assert remote.layer.inspect().weight == [1, 1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parameters_and_input_on_a_gpu(client, name):
    remote, local = RemoteBatchNorm2d(3, client=client, name=name, device="cuda"), nn.BatchNorm2d(3, device="cuda")
    batch = torch.randn(6, 3, 4, 4, device="cuda")
    grads = []
    for module in (remote, local):
        x = batch.clone().requires_grad_()
        output = module(x)
        output.sin().sum().backward()
        assert output.device == x.device
        grads.append((output, x.grad, module.weight.grad, module.bias.grad))
    assert all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) for ours, theirs in zip(*grads, strict=True))
    for key, value in local.state_dict().items():
        assert remote.state_dict()[key].device == value.device
        assert torch.allclose(remote.state_dict()[key], value)
