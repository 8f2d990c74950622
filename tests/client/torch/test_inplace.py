"""What comes out of a remote module may be modified in place, as what comes out of torch's may."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from batchnorm_client import Client
from batchnorm_client.torch import RemoteBatchNorm1d, RemoteBatchNorm2d, convert_batchnorm
from client.harness import NOW
from client.torch.test_resnet import BasicBlock, conv1x1


@pytest.fixture(autouse=True)
def _one_thread():
    """As many intra-op threads as the service has: results are bit-equal then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gradients(model, x):
    """The output, and the gradients of input and parameters; the loss has a gradient that differs everywhere."""
    x = x.clone().requires_grad_()
    output = model(x)
    (output.sin() * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    found = [output.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return found


def assert_equal(ours, theirs):
    assert all(torch.equal(mine, torchs) for mine, torchs in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("compute", ["remote", "local"])
def test_a_residual_net_with_relus_in_place(client, name, compute):
    torch.manual_seed(0)
    local = nn.Sequential(BasicBlock(2, 4, 2, nn.Sequential(conv1x1(2, 4, 2), nn.BatchNorm2d(4))), BasicBlock(4, 4))
    model = convert_batchnorm(copy.deepcopy(local), client, name, compute=compute)
    optimizers = [torch.optim.SGD(found.parameters(), 0.1) for found in (model, local)]
    for _ in range(2):
        x = torch.randn(6, 2, 8, 8)
        assert_equal(gradients(model, x), gradients(local, x))
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(gradients(model.eval(), x), gradients(local.eval(), x))
    with torch.no_grad():
        assert torch.equal(model(x), local(x))
    assert_equal(model.state_dict().values(), local.state_dict().values())


class Modified(nn.Module):
    """A normalization whose output is modified in place."""

    def __init__(self, norm, change):
        super().__init__()
        self.norm = norm
        self.change = change

    def forward(self, x):
        y = self.norm(x)
        self.change(y, x)
        return y


CHANGES = {
    "relu_": lambda y, _: y.relu_(),
    "add a number": lambda y, _: y.add_(1),
    "add a tensor with a gradient": lambda y, x: y.add_(x),
    "multiply": lambda y, x: y.mul_(x),
    "assign to a part": lambda y, x: y[:, :1].copy_(x[:, 1:2]),
    "twice": lambda y, x: y.mul_(2).add_(x).relu_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("compute", ["remote", "local"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_through_a_change_in_place(client, name, training, compute, change):
    local = Modified(nn.BatchNorm2d(3), change)
    remote = Modified(RemoteBatchNorm2d(3, client=client, name=name, compute=compute), change)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 2, 2).contiguous(memory_format=memory_format)
        ours, theirs = gradients(remote.train(training), x), gradients(local.train(training), x)
        if memory_format == torch.contiguous_format or not training:
            assert_equal(ours, theirs)
        else:  # the service sums in the order of the contiguous layout
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("compute", ["remote", "local"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_output_made_without_gradients_is_modified_with_them(client, name, training, compute):
    remote = RemoteBatchNorm1d(3, client=client, name=name, compute=compute).train(training)
    step = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        y = remote(torch.randn(4, 3))
    y += step
    y.sum().backward()
    assert step.grad.tolist() == [4, 4, 4]


def test_an_empty_batch_is_modified_in_place(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name).eval()
    y = remote(torch.zeros(0, 3, requires_grad=True))
    y += 1
    y.sum().backward()
    assert remote.bias.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("compute", ["remote", "local"])
def test_shards_of_a_synchronized_batch_are_modified_in_place(url, name, compute):
    torch.manual_seed(0)
    sizes = [3, 0, 2]
    whole = nn.BatchNorm1d(3).double()
    x, weights = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    with ThreadPoolExecutor(len(sizes)) as pool, Client(url, retry=NOW) as client:
        members = [
            RemoteBatchNorm1d(
                3, dtype=torch.float64, client=client, name=name, compute=compute, group=name, group_size=3
            )
            for _ in sizes
        ]

        def work(member, shard, weights):
            shard = shard.clone().requires_grad_()
            y = member(shard)
            y += 1
            (y.relu_() * weights).sum().backward()
            return shard.grad

        found = list(pool.map(work, members, x.split(sizes), weights.split(sizes)))
    x.requires_grad_()
    y = whole(x)
    y += 1
    (y.relu_() * weights).sum().backward()
    torch.testing.assert_close(torch.cat(found), x.grad)
    for field in ("weight", "bias"):
        total = sum(member.get_parameter(field).grad for member in members)
        torch.testing.assert_close(total, whole.get_parameter(field).grad)


def test_results_of_calls_are_no_views(client, name):
    layer = client.create_layer(name, 3)
    results = [layer.train(torch.randn(4, 3), statistics=True), layer.eval(torch.randn(4, 3))]
    tensors = [result.output for result in results] + [results[0].statistics.mean]
    tensors += layer.state_dict(as_torch=True).values()
    tensors += [layer.backward(torch.randn(4, 3), torch.randn(4, 3)).grad_input]
    assert not any(tensor._is_view() for tensor in tensors)
