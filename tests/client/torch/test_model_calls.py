"""A model that was converted reads and sends in one call for each forward pass, and misses no commit."""

import threading

import pytest
import torch
from torch import nn

from batchnorm_client.torch import convert_batchnorm, revert, snapshot

LAYERS = 5


def plain():
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())]
    return nn.Sequential(*layers)


def calls_of(way, function):
    way.sent.clear()
    result = function()
    return result, sorted(way.sent)


BATCH = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(watched, name):
    return convert_batchnorm(plain(), watched, name, compute="local")


def train_elsewhere(client, name, index=1):
    client.layer(f"{name}{index}").train(BATCH.numpy())


def test_a_pass_in_eval_mode_asks_once_and_sees_every_commit(way, model, client, name):
    torchs = plain().eval()
    for _ in range(2):
        output, sent = calls_of(way, lambda: model.eval()(BATCH))
        assert sent == ["GET state"]
        torch.testing.assert_close(output, torchs(BATCH))
    for step in range(3):
        train_elsewhere(client, name, 1 + 3 * step)
        client.layer(f"{name}{1 + 3 * step}").update(eps=0.1 * (step + 1))
        torchs = snapshot(model).eval()
        output, sent = calls_of(way, lambda: model(BATCH))
        assert sent == ["GET state"]
        torch.testing.assert_close(output, torchs(BATCH))


def test_parameters_that_an_optimizer_changed_are_sent_in_one_call(way, watched, name, model):
    remote = convert_batchnorm(plain(), watched, f"{name}remote.")
    for each, expected in ((remote, ["PUT state", *["POST train"] * LAYERS]), (model, ["POST moments"])):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        each.train()(BATCH).square().sum().backward()
        optimizer.step()
        assert calls_of(way, lambda each=each: each(BATCH))[1] == sorted(expected)
    assert calls_of(way, lambda: remote.eval()(BATCH))[1] == ["POST eval"] * LAYERS
    output, sent = calls_of(way, lambda: model.eval()(BATCH))
    assert sent == ["GET state", "PUT state"]
    torch.testing.assert_close(output, snapshot(model)(BATCH))
    assert calls_of(way, lambda: model(BATCH))[1] == ["GET state"]


def test_parameters_that_change_during_the_pass(way, model):
    model.eval()(BATCH)

    def change(module, _):
        module.weight.data.mul_(2)

    hook = model[7].register_forward_pre_hook(change)
    output, sent = calls_of(way, lambda: model(BATCH))
    hook.remove()
    assert "GET state" in sent
    torch.testing.assert_close(output, snapshot(model)(BATCH))


@pytest.mark.parametrize("training", [False, True])
def test_parameters_in_another_dtype_are_refused_also_if_they_are_equal(watched, name, training):
    model = convert_batchnorm(plain(), watched, name).train(training)
    model[4].half()  # 1 and 0, as they were sent
    with pytest.raises(TypeError, match=r"weight is torch\.float16"):
        model(BATCH)


def test_a_module_that_is_used_alone_asks_itself(way, model, client, name):
    model.eval()(BATCH)
    train_elsewhere(client, name)
    expected = snapshot(model)[:2].eval()(BATCH)
    output, sent = calls_of(way, lambda: model[:2](BATCH))
    assert len(sent) == 1
    torch.testing.assert_close(output, expected)


class Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("error", [RuntimeError, Interrupt])
def test_after_a_pass_that_failed_nothing_old_is_used(model, client, name, error):
    model.eval()

    def fail(*_):
        raise error

    hook = model[3].register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(BATCH)
    hook.remove()
    train_elsewhere(client, name)
    torch.testing.assert_close(model[:2](BATCH), snapshot(model)[:2](BATCH))
    train_elsewhere(client, name)
    torch.testing.assert_close(model(BATCH), snapshot(model)(BATCH))


def test_a_change_by_the_module_itself_during_the_pass(model):
    model.eval()

    def reset(*_):
        model[4].running_mean = torch.full((3,), 0.5)

    hook = model[3].register_forward_pre_hook(reset)
    output = model(BATCH)
    hook.remove()
    torch.testing.assert_close(output, snapshot(model)(BATCH))


def test_passes_of_threads_do_not_share_what_they_read(model, client, name):
    model.eval()
    entered, go_on = threading.Event(), threading.Event()

    def stop(*_):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            assert go_on.wait(30)

    model[2].register_forward_pre_hook(stop)
    outputs = []
    before = snapshot(model)
    thread = threading.Thread(target=lambda: outputs.append(model(BATCH)))
    thread.start()
    assert entered.wait(30)
    train_elsewhere(client, name)
    now = model(BATCH)
    go_on.set()
    thread.join()
    after = snapshot(model)
    torch.testing.assert_close(now, after(BATCH))
    torch.testing.assert_close(outputs[0], before(BATCH))
    assert not torch.allclose(now, outputs[0])


def test_a_layer_that_refuses_its_parameters(watched, name):
    model = convert_batchnorm(plain(), watched, name)
    watched.layer(f"{name}4").delete()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    with pytest.raises(Exception, match="no layer") as caught:
        model(BATCH)
    assert f"{name}4" in str(caught.value.__notes__)
    assert watched.layer(f"{name}1").inspect().weight == [2, 2, 2]


def test_reverted_models_and_copies_make_no_calls(way, model):
    copied = snapshot(model)
    assert calls_of(way, lambda: copied.eval()(BATCH))[1] == []
    assert not copied._forward_pre_hooks
    revert(model)
    assert calls_of(way, lambda: model.eval()(BATCH))[1] == []
    assert not model._forward_pre_hooks


def test_many_names_are_read_in_several_calls(way, watched, name):
    long = name + "x" * (190 - len(name)) + "."
    wide = nn.Sequential(*[nn.BatchNorm1d(1) for _ in range(100)])  # 19,300 characters
    model = convert_batchnorm(wide, watched, long, compute="local").eval()
    _, sent = calls_of(way, lambda: model(torch.randn(4, 1)))
    assert sent == ["GET state"] * 2
