"""Several workers whose shards are one batch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from batchnorm_client import Client, GroupIncomplete
from batchnorm_client.torch import RemoteBatchNorm1d, convert_batchnorm
from client.harness import NOW

SIZES = [5, 1, 0, 3]


def net(width=4):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.BatchNorm1d(width, affine=False))


def loss_of(model, x, weights):
    return (model(x).sin() * weights).sum()


@pytest.mark.parametrize("compute", ["remote", "local"])
def test_workers_train_as_one(url, name, compute):
    """Losses add up to that of one process with the whole batch, gradients too, over several steps of an optimizer."""
    torch.manual_seed(0)
    batches = [(torch.randn(9, 3) * 2 + 1, torch.randn(9, 4)) for _ in range(4)]
    whole = net().double()
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    workers = [net().double() for _ in SIZES]
    with ThreadPoolExecutor(len(SIZES)) as pool, Client(url, retry=NOW) as client:
        for worker in workers:
            convert_batchnorm(worker, client, prefix=name, compute=compute, group=name, group_size=len(SIZES))
        optimizers = [torch.optim.SGD(worker.parameters(), 0.1) for worker in workers]
        for x, weights in batches:
            shards = list(zip(x.double().split(SIZES), weights.double().split(SIZES), strict=True))

            def work(index, shards=shards):
                optimizers[index].zero_grad()
                loss = loss_of(workers[index], *shards[index])
                loss.backward()
                return loss.item()

            losses = list(pool.map(work, range(len(SIZES))))
            optimizer.zero_grad()
            expected = loss_of(whole, x.double(), weights.double())
            expected.backward()
            assert sum(losses) == pytest.approx(expected.item(), abs=1e-9)
            for parameters in zip(whole.parameters(), *(worker.parameters() for worker in workers), strict=True):
                total = sum(parameter.grad for parameter in parameters[1:])
                torch.testing.assert_close(total, parameters[0].grad, rtol=1e-7, atol=1e-9)
                for parameter in parameters[1:]:
                    parameter.grad = total.clone()
            for one in (optimizer, *optimizers):
                one.step()
        assert client.layer(name + "1").inspect().num_batches_tracked == len(batches)
        state = workers[0].state_dict()
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-9)
        x = torch.randn(2, 3).double()
        torch.testing.assert_close(workers[3].eval()(x), whole.eval()(x), rtol=1e-7, atol=1e-9)


def test_a_worker_alone_gives_up(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name, group="run", group_size=2, group_timeout=0.05)
    with pytest.raises(GroupIncomplete):
        remote(torch.randn(4, 3))
    assert remote.num_batches_tracked.item() == 0


def test_group_and_group_size_go_together(client, name):
    for options in ({"group": "run"}, {"group_size": 2}):
        with pytest.raises(ValueError, match="go together"):
            RemoteBatchNorm1d(3, client=client, name=name, **options)
    assert not list(client.layers(prefix=name))
