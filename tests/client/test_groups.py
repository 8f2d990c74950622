"""Batches that many callers share."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch

from batchnorm_client import Client, GroupClosed, GroupIncomplete, GroupMismatch, InvalidRequest, Retry
from batchnorm_client.core import Attempts, calls
from batchnorm_client.core.group_member import GroupMember
from client.harness import NOW, StoppedClock

X = np.random.default_rng(3).normal(2, 3, size=(9, 3)).astype(np.float32)
SHARDS = [X[:4], X[4:5], X[5:5], X[5:]]


@pytest.fixture
def members(url):
    """`members(call)` runs `call(layer's client, index)` for every shard at once."""
    with ThreadPoolExecutor(len(SHARDS)) as pool, Client(url, retry=NOW) as client:

        def run(call):
            return list(pool.map(lambda index: call(client, index), range(len(SHARDS))))

        yield run


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("call", ["train", "train_local", "both"])
def test_shards_equal_the_whole_batch(members, other, name, kind, call):
    layer = other.create_layer(name, 3)
    layer.update(weight=[0.5, 2.0, -1.0], bias=[1.0, 0.0, 3.0])

    def train(client, index):
        how = ("train", "train_local")[index % 2] if call == "both" else call
        return getattr(client.layer(name), how)(kind(SHARDS[index]), group="g", size=4, statistics=True)

    results = members(train)
    module = torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        module.bias.copy_(torch.tensor([1.0, 0.0, 3.0]))
        expected = module(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(np.concatenate([one.output for one in results]), expected, rtol=1e-5, atol=1e-5)
    for result in results:
        assert result.num_batches_tracked == 1
        np.testing.assert_allclose(result.statistics.mean, X.mean(0), rtol=1e-5)
        np.testing.assert_allclose(result.statistics.var, X.var(0), rtol=1e-5)
    np.testing.assert_allclose(layer.inspect().running_mean, module.running_mean, rtol=1e-5)
    assert layer.inspect().samples_tracked == 9


def test_members_that_bring_moments_get_those_of_all(members, other, name):
    other.create_layer(name, 3, statistics="population")

    def fold(client, index):
        part = SHARDS[index].astype(np.float64)
        mean, var = (part.mean(0), part.var(0)) if len(part) else (np.zeros(3), np.zeros(3))
        return client.layer(name).fold_moments(len(part), mean, var, group="g", size=4)

    whole = X.astype(np.float64)
    for result in members(fold):
        assert result.count == 9
        np.testing.assert_allclose(result.mean, whole.mean(0), rtol=1e-14)
        np.testing.assert_allclose(result.var, whole.var(0), rtol=1e-13)


def test_backward_of_shards_is_that_of_the_whole(members, other, name):
    layer = other.create_layer(name, 3)
    grad = np.random.default_rng(4).normal(size=X.shape).astype(np.float32)
    parts = np.split(grad, [4, 5, 5])
    results = members(lambda client, i: client.layer(name).backward(SHARDS[i], parts[i], group="g", size=4))
    whole = layer.backward(X, grad)
    joined = np.concatenate([one.grad_input for one in results])
    np.testing.assert_allclose(joined, whole.grad_input, rtol=1e-4, atol=1e-6)
    for field in ("grad_weight", "grad_bias"):
        summed = sum(getattr(one, field) for one in results)
        np.testing.assert_allclose(summed, getattr(whole, field), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("call", ["train", "train_local"])
def test_an_incomplete_group_is_not_tried_again(shaky, way, client, name, call):
    client.create_layer(name, 3)
    layer = shaky.layer(name)
    with pytest.raises(GroupIncomplete) as raised:
        getattr(layer, call)(X, group="g", size=2, timeout=0.05)
    assert raised.value.fields["expected"] == 2
    assert not raised.value.outcome_unknown
    assert [sent for sent in way.sent if sent.startswith("POST")] == [
        f"POST {'train' if call == 'train' else 'moments'}"
    ]
    with pytest.raises(GroupClosed):
        layer.train(X, group="g", size=2)
    with pytest.raises(GroupMismatch):
        layer.train(X, group="g", size=3)
    assert layer.inspect().num_batches_tracked == 0


def test_a_member_whose_answer_was_lost_gets_it_again(shaky, way, client, name):
    client.create_layer(name, 3)
    way.faults = ["unheard"]
    result = shaky.layer(name).train(X, group="g", size=1)
    assert (result.replayed, result.num_batches_tracked) == (True, 1)
    assert len({headers["idempotency-key"] for headers in way.headers}) == 1


def test_group_and_size_go_together(layer):
    for options in ({"group": "g"}, {"size": 2}, {"timeout": 3.0}):
        for call in (layer.train, layer.train_local, lambda x, **given: layer.backward(x, x, **given)):
            with pytest.raises(InvalidRequest, match="go together"):
                call(X, **options)


@pytest.mark.parametrize(("timeout", "longer"), [(None, 30), (400.0, 400), (0.5, 0.5)])
def test_the_client_waits_longer_than_the_group(connect, timeout, longer):
    seen = []

    def answer(request):
        seen.append(request.extensions["timeout"])
        return httpx.Response(504, json={"type": "/problems/group-incomplete", "detail": "no"})

    layer = connect.over(answer, retry=Retry(deadline=60)).layer("x")
    with pytest.raises(GroupIncomplete):
        layer.train(X, group="g", size=2, timeout=timeout)
    (limits,) = seen
    assert limits["read"] > longer
    assert limits["connect"] <= 60
    request = calls.train("x", X, key="k", statistics=False, member=GroupMember("g", 2, timeout))
    attempts = Attempts(request, Retry(deadline=60), StoppedClock())
    assert attempts.remaining() == 60 + longer
