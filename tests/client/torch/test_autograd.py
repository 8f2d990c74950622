"""Gradients through the service: numerically right, twice, and asked for only where they are needed."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from batchnorm_client.torch import RemoteBatchNorm1d, RemoteBatchNorm2d

COMPUTE = pytest.mark.parametrize("compute", ["remote", "local"])
OPTIONS = [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}]


@pytest.fixture
def calls(client, monkeypatch):
    """The targets of the client's calls."""
    sent = []
    call = client._call

    def spy(request, *arguments):
        sent.append(request.target)
        return call(request, *arguments)

    monkeypatch.setattr(client, "_call", spy)
    return sent


@COMPUTE
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 2, 2)], ids=str)
def test_gradcheck(client, name, options, training, shape, compute):
    torch.manual_seed(0)
    cls = RemoteBatchNorm1d if len(shape) == 2 else RemoteBatchNorm2d
    remote = cls(2, client=client, name=name, dtype=torch.float64, compute=compute, **options)
    with torch.no_grad():
        for parameter in remote.parameters():
            parameter.uniform_(-2, 2)
        remote(torch.randn(shape, dtype=torch.float64) * 3 + 1)
    remote.train(training)

    def function(x, *parameters):
        names = [found for found, _ in remote.named_parameters()]
        return torch.func.functional_call(remote, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    arguments = (x, *(parameter.detach().clone().requires_grad_() for parameter in remote.parameters()))
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


@COMPUTE
def test_a_gradient_penalty_is_torchs(client, name, compute):
    remote, local = RemoteBatchNorm1d(3, client=client, name=name, compute=compute), nn.BatchNorm1d(3)
    torch.manual_seed(0)
    batch = torch.randn(8, 3)
    grads = []
    for module in (remote, local):
        x = batch.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        grad.square().sum().backward()
        grads.append((x.grad, module.weight.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_statistics_are_asked_for_only_if_a_gradient_can_be_needed(client, name, calls):
    remote = RemoteBatchNorm1d(3, client=client, name=name)
    frozen = RemoteBatchNorm1d(3, client=client, name=name).requires_grad_(False)
    batch = torch.randn(4, 3)
    calls.clear()
    remote(batch)
    frozen(batch.clone().requires_grad_())
    remote.eval()(batch)
    path = f"/v1/layers/{name}"
    assert calls == [f"{path}/train?statistics=true"] * 2 + [f"{path}/eval?statistics=true"]
    calls.clear()
    assert not frozen(batch).requires_grad
    with torch.no_grad():
        assert not remote(batch).requires_grad
        remote.train()(batch)
    assert calls == [f"{path}/train", f"{path}/eval", f"{path}/train"]


@COMPUTE
def test_only_asked_gradients_are_made(client, name, compute):
    remote = RemoteBatchNorm1d(3, client=client, name=name, compute=compute)
    remote.bias.requires_grad_(False)
    remote(torch.randn(4, 3)).sin().sum().backward()
    assert remote.weight.grad is not None
    assert remote.bias.grad is None


@COMPUTE
def test_a_parameter_that_changed_before_backward_is_noticed_as_in_torch(client, name, compute):
    remote = RemoteBatchNorm1d(3, client=client, name=name, compute=compute)
    loss = remote(torch.randn(4, 3, requires_grad=True)).sin().sum()
    with torch.no_grad():
        remote.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
