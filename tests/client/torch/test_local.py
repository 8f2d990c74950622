"""Modules that compute here and send only moments."""

import copy

import pytest
import torch
from torch import nn

from batchnorm_client import NonFinite, TimedOut
from batchnorm_client.torch import RemoteBatchNorm, RemoteBatchNorm1d, RemoteBatchNorm2d, convert_batchnorm, revert
from batchnorm_client.torch import flush as flush_moments
from client.torch.test_convert import assert_same, net, steps
from client.torch.test_modules import OPTIONS, TWINS, assert_equal_states, batch_of, step


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", TWINS, ids=str)
def test_training_is_equal_bit_by_bit(client, name, shape, options):
    ours, theirs = TWINS[shape]
    torch.manual_seed(0)
    remote, local = ours(3, client=client, name=name, compute="local", **options), theirs(3, **options)
    optimizers = [
        torch.optim.Adam(module.parameters(), 0.1) if list(module.parameters()) else None for module in (remote, local)
    ]
    for _ in range(4):
        batch = batch_of(shape, options.get("dtype", torch.float32))
        for mine, torchs in zip(step(remote, batch, optimizers[0]), step(local, batch, optimizers[1]), strict=True):
            assert torch.equal(mine, torchs)
    if options.get("dtype") == torch.float64:
        # A float64 variance is made biased and unbiased again on its way.
        torch.testing.assert_close(remote.running_var, local.running_var, rtol=1e-15, atol=0)
        remote.load_state_dict(local.state_dict())
    assert_equal_states(remote, local)
    remote.eval()
    local.eval()
    batch = batch_of(shape, options.get("dtype", torch.float32))
    for mine, torchs in zip(step(remote, batch, None), step(local, batch, None), strict=True):
        assert torch.equal(mine, torchs)
    assert_equal_states(remote, local)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(client, name, dtype, options):
    remote = RemoteBatchNorm2d(3, client=client, name=name, compute="local", **options)
    local = nn.BatchNorm2d(3, **options)
    for _ in range(3):
        batch = batch_of((6, 3, 4, 5), dtype)
        for mine, torchs in zip(step(remote, batch, None), step(local, batch, None), strict=True):
            if dtype == torch.bfloat16 and len(options) == 2:
                # With nothing in float32 around, torch rounds a bfloat16 batch's invstd in a way of its own.
                assert torch.allclose(mine, torchs, rtol=2**-6, atol=2**-6)
            else:
                assert torch.equal(mine, torchs)
    assert_equal_states(remote, local, ulps=3)


def test_channels_last_are_equal_bit_by_bit_too(client, name):
    remote, local = RemoteBatchNorm2d(3, client=client, name=name, compute="local"), nn.BatchNorm2d(3)
    batch = batch_of((6, 3, 4, 5)).contiguous(memory_format=torch.channels_last)
    for mine, torchs in zip(step(remote, batch, None), step(local, batch, None), strict=True):
        assert mine.stride() == torchs.stride()
        assert torch.equal(mine, torchs)


def test_a_net_folds_with_one_call_per_step(watched, way, name):
    local, model = net(), convert_batchnorm(net(), watched, prefix=name, compute="local")
    optimizers = [torch.optim.Adam(found.parameters(), 0.01) for found in (local, model)]
    way.sent.clear()
    assert steps(model, optimizers[1], 5) == steps(local, optimizers[0], 5)
    assert way.sent == ["POST moments"] * 5
    assert_same(model, local)
    with torch.no_grad():
        for found in (local.eval(), model.eval()):
            found(torch.randn(4, 1, 6, 6))
    assert_same(model, local)
    assert revert(model) is model
    assert_same(model, local)
    assert not model._forward_hooks
    copy.deepcopy(model)


def test_an_answer_that_was_lost_counts_nothing_twice(watched, way, name):
    local, model = net(), convert_batchnorm(net(), watched, prefix=name, compute="local")
    optimizers = [torch.optim.SGD(found.parameters(), 0.01) for found in (local, model)]
    way.faults = ["unheard", None, "lost"]
    assert steps(model, optimizers[1]) == steps(local, optimizers[0])
    assert_same(model, local)


def test_what_could_not_be_sent_waits_under_the_same_key(watched, way, name):
    local, model = net(), convert_batchnorm(net(), watched, prefix=name, compute="local")
    x = torch.randn(4, 1, 6, 6)
    local(x)
    way.faults = ["unheard"] * 20
    with pytest.raises(TimedOut) as raised:
        model(x)
    assert raised.value.outcome_unknown
    way.faults.clear()
    flush_moments(model)
    assert_same(model, local)


def test_evaluation_and_reading_see_what_waits(client, name):
    model = convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), client, prefix=name, compute="local")
    x = torch.randn(8, 3)
    model[0](x)  # by itself: nobody flushes after it
    assert client.layer(name + "0").inspect().num_batches_tracked == 0
    assert model[0].num_batches_tracked.item() == 1
    model[0](x)
    model[0].eval()(x)
    assert client.layer(name + "0").inspect().num_batches_tracked == 2
    model[1](x)
    flush_moments(model)
    assert client.layer(name + "1").inspect().num_batches_tracked == 1


def test_a_module_in_two_places_folds_both_batches_in_order(client, name):
    shared = nn.BatchNorm1d(3)
    local = nn.Sequential(shared, nn.Linear(3, 3), shared)
    model = convert_batchnorm(copy.deepcopy(local), client, prefix=name, compute="local")
    for _ in range(3):
        x = torch.randn(8, 3)
        assert torch.equal(model(x), local(x))
    assert_same(model, local)


def test_a_batch_that_is_refused_is_refused_before_its_output(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name, compute="local")
    with pytest.raises(NonFinite):
        remote(torch.full((4, 3), torch.nan))
    assert remote.num_batches_tracked.item() == 0


def test_one_layer_that_refuses_does_not_hold_up_the_others(client, name):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    convert_batchnorm(model, client, prefix=name, compute="local")
    client.layer(name + "0").delete()
    with pytest.raises(Exception, match="no layer") as raised:
        model(torch.randn(8, 3))
    assert any(f"layer '{name}0'" in note for note in raised.value.__notes__)
    assert client.layer(name + "1").inspect().num_batches_tracked == 1
    model[1](torch.randn(8, 3))
    flush_moments(model)  # what was refused does not come again


def test_parameters_are_sent_when_somebody_else_needs_them(client, name):
    remote = RemoteBatchNorm1d(3, client=client, name=name, compute="local")
    nn.init.constant_(remote.weight, 2)
    remote(torch.randn(8, 3))
    assert remote.layer.inspect().weight == [1, 1, 1]
    x = torch.randn(8, 3)
    assert torch.equal(remote.eval()(x), RemoteBatchNorm1d(3, client=client, name=name).eval()(x))
    assert remote.layer.inspect().weight == [2, 2, 2]
    assert isinstance(remote, RemoteBatchNorm)


def test_gradients_in_eval_mode_after_somebody_else_has_written_the_parameters(client, name):
    """The output is the service's, with its parameters; the input's gradient is that of this module's."""
    modules = [RemoteBatchNorm1d(3, client=client, name=name, compute=compute) for compute in ("remote", "local")]
    x = torch.randn(8, 3)
    modules[0](x)
    client.layer(name).update(weight=[2.0, 3.0, 4.0], bias=[1.0, 1.0, 1.0])
    found = []
    for module in modules:
        given = x.clone().requires_grad_()
        output = module.eval()(given)
        output.sin().sum().backward()
        with torch.no_grad():
            assert torch.equal(module(given), output)
        found.append((output, given.grad, module.weight.grad, module.bias.grad))
    for remote, local in zip(*found, strict=True):
        torch.testing.assert_close(local, remote, rtol=1e-6, atol=1e-7)
