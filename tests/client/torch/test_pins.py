"""Pins of whole models, frozen evaluation with them, and snapshots that say where they come from."""

import copy
import io
import itertools
import pickle

import httpx
import pytest
import torch
from torch import nn

from batchnorm_client import Client, DigestMismatch, InvalidRequest, PinExists, TooManyPins, VersionNotFound
from batchnorm_client.torch import RemoteBatchNorm, RemoteBatchNorm1d, convert_batchnorm, flush, pin, revert, snapshot
from client.harness import NOW, Way, serving
from client.torch.test_convert import assert_same, net, steps

X = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(3))
BATCH = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0], [-1.0, 0.0, 2.0]])


@pytest.fixture
def run(client, name):
    """A model whose normalization was pinned and then changed: (the model, a plain copy from before, digests)."""
    model = convert_batchnorm(net(), client, name)
    steps(model, torch.optim.Adam(model.parameters(), 0.01))
    digests = pin(model, "ckpt")
    then = snapshot(model).eval()
    nn.init.constant_(model.stem[1].weight, 0.5)
    model(X * 2)
    return model, then, digests


@pytest.fixture
def way(url):
    """A client whose calls are recorded."""
    way = Way(url)
    http = httpx.Client(transport=httpx.MockTransport(way), base_url="http://service")
    with http, Client(http=http, retry=NOW) as client:
        way.client = client
        yield way
    way.close()


def remotes(model):
    return [found for found in model.modules() if isinstance(found, RemoteBatchNorm)]


def versions(client, name):
    return {layer.name: layer.version for layer in client.layers(name)}


@pytest.mark.parametrize("compute", ["remote", "local"])
def test_a_checkpoint_gives_the_same_outputs_years_later(client, name, run, compute):
    model, then, digests = run
    assert digests.keys() == {remote.name for remote in remotes(model)}
    expected = then(X)
    assert not torch.equal(model.eval()(X), expected)
    before = versions(client, name)
    frozen = convert_batchnorm(copy.deepcopy(then), client, name, at="ckpt", expect=digests, compute=compute)
    assert len(remotes(frozen)) == len(digests)
    for mode in (True, False):
        frozen.train(mode)
        assert torch.equal(frozen(X), expected), "as eval, also in train mode"
    steps(frozen.train(), torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], 0.01))
    assert versions(client, name) == before


@pytest.mark.parametrize("compute", ["remote", "local"])
def test_gradients_are_those_of_torchs_evaluation(client, name, compute):
    layer = client.create_layer(name, 3, dimensions=1)
    layer.train(BATCH)
    layer.update(weight=[2.0, 0.5, 1.0], bias=[0.0, 1.0, 2.0])
    layer.pin("a")
    layer.train(BATCH * 3)
    frozen = RemoteBatchNorm1d(3, client=client, name=name, at="a", compute=compute)
    local = snapshot(frozen).eval()
    x, y = (BATCH.clone().requires_grad_() for _ in range(2))
    out, expected = frozen.train()(x), local(y)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert frozen.weight.grad is None
    assert frozen.train()(torch.zeros(0, 3)).shape == (0, 3)
    assert frozen(BATCH[:1]).shape == (1, 3), "one value per channel is enough for running statistics"


@pytest.mark.parametrize("compute", ["remote", "local"])
def test_no_gradient_flows_from_what_was_clipped(client, name, compute):
    layer = client.create_layer(name, 3, clip=0.5)
    layer.update(weight=[0.5, 2.0, -1.0], bias=[0.1, 0.0, -0.2])
    layer.train(torch.tensor([[1.0, 2, 3], [3, 0, 5], [2, 2, 2]]))
    layer.pin("a")
    frozen = RemoteBatchNorm1d(3, client=client, name=name, at="a", compute=compute)
    local = snapshot(frozen).eval()
    mine, torchs = (torch.linspace(-3, 6, 24).reshape(8, 3).requires_grad_() for _ in range(2))
    output, expected = frozen(mine), local(torchs).clamp(-0.5, 0.5)
    assert 0 < (expected.abs() == 0.5).sum() < expected.numel()
    assert torch.equal(output, expected)
    output.sin().sum().backward()
    expected.sin().sum().backward()
    assert torch.equal(mine.grad, torchs.grad)


def test_a_frozen_model_with_local_compute_needs_no_service(way, name, run):
    _, then, digests = run
    frozen = convert_batchnorm(copy.deepcopy(then), way.client, name, at="ckpt", expect=digests, compute="local")
    frozen(X)
    way.sent.clear()
    way.faults = ["refused"] * 100
    assert torch.equal(frozen.train()(X), then(X))
    assert not way.sent


def test_layers_are_only_read(way, name, run):
    _, then, _ = run
    frozen = convert_batchnorm(net(), way.client, name, at="ckpt")
    frozen.load_state_dict(then.state_dict())
    frozen(X)
    flush(frozen)
    assert_same(snapshot(frozen), then)
    assert {call.split()[0] for call in way.sent} == {"GET", "POST"}
    assert {call for call in way.sent if call.startswith("POST")} == {"POST eval"}


def test_what_would_change_a_frozen_layer_is_refused(client, name, run):
    model, _, digests = run
    before = versions(client, name)
    frozen = convert_batchnorm(net(), client, name, at="ckpt")
    norm = remotes(frozen)[0]
    for change in (
        lambda: frozen.load_state_dict(model.state_dict()),
        norm.reset_running_stats,
        lambda: setattr(norm, "running_mean", torch.ones(norm.num_features)),
        lambda: pin(frozen, "again"),
    ):
        with pytest.raises(ValueError, match=r"evaluates?|only reads"):
            change()
    x = torch.randn(2, norm.num_features, 3, 3)
    kept = client.layer(norm.name, at="ckpt", expect=digests[norm.name])
    assert torch.equal(norm(x), kept.eval(x).output)
    with torch.no_grad():
        norm.weight += 1
    with pytest.raises(ValueError, match="weight of this module changed"):
        frozen(X)
    norm.pull()
    frozen(X)
    norm.eps = 0.5
    with pytest.raises(ValueError, match="eps of this module changed"):
        norm.eval()(torch.zeros(2, norm.num_features, 2, 2))
    assert versions(client, name) == before


def test_a_checkpoint_of_another_state_is_not_loaded(client, name, run):
    model, then, _ = run
    frozen = convert_batchnorm(copy.deepcopy(then), client, name, at="ckpt")
    with pytest.raises(ValueError, match="not those of the state that this module evaluates"):
        frozen.load_state_dict(model.state_dict())
    norm = remotes(frozen)[0]
    assert torch.equal(norm.weight, then.stem[1].weight), "the kept values are back"
    frozen.load_state_dict(then.state_dict())
    assert torch.equal(frozen(X), then(X))


def test_optimizers_leave_frozen_parameters_alone(client, name, run):
    _, then, _ = run
    model = copy.deepcopy(then)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
    steps(model, optimizer)
    model.load_state_dict(then.state_dict())
    model(X).sum().backward()  # there are gradients when it is converted
    frozen = convert_batchnorm(model, client, name, at="ckpt")
    optimizer.step()
    norm = remotes(frozen)[0]
    assert torch.equal(norm.weight, then.stem[1].weight)
    assert not any(parameter.requires_grad for parameter in norm.parameters())
    reverted = revert(frozen)
    assert type(reverted.stem[1]) is nn.BatchNorm2d
    assert all(parameter.requires_grad for parameter in reverted.stem[1].parameters())
    assert torch.equal(reverted.stem[1].running_var, then.stem[1].running_var)


def test_all_layers_without_the_pin_are_named_at_once(client, name, run):
    _, then, digests = run
    names = sorted(digests)
    for layer in names[1:]:
        client.layer(layer).unpin("ckpt")
    model = copy.deepcopy(then)
    for call in (lambda: convert_batchnorm(model, client, name, at="ckpt"), lambda: snapshot(run[0], at="ckpt")):
        with pytest.raises(VersionNotFound) as raised:
            call()
        assert sorted(raised.value.fields["layers"]) == names[1:]
        assert all(layer in str(raised.value) for layer in names[1:])
        assert names[0] not in str(raised.value)
    assert not remotes(model)
    with pytest.raises(VersionNotFound, match="do not exist"):
        convert_batchnorm(
            model,
            client,
            f"{name}other.",
            expect={f"{name}other{key.removeprefix(name[:-1])}": digest for key, digest in digests.items()},
        )


def test_digests_that_do_not_belong_together(client, name, run):
    model, then, digests = run
    wrong = dict(zip(digests, [*list(digests.values())[1:], "sha-256:" + "0" * 64], strict=True))
    plain = copy.deepcopy(then)
    for arguments in ({"at": "ckpt", "expect": wrong}, {"expect": digests}):
        with pytest.raises(DigestMismatch):
            convert_batchnorm(plain, client, name, **arguments)
    for keys in (list(digests)[1:], [*digests, f"{name}more"]):
        with pytest.raises(ValueError, match="different models"):
            convert_batchnorm(plain, client, name, at="ckpt", expect=dict.fromkeys(keys, next(iter(digests.values()))))
    assert not remotes(plain)
    pin(model, "later")
    moved = convert_batchnorm(copy.deepcopy(then), client, name, at="later")
    for layer in digests:
        client.layer(layer).unpin("later")
        client.layer(layer).reset()
        client.layer(layer).pin("later")
    with pytest.raises(DigestMismatch):
        moved(X)


def test_the_newest_state_with_its_digest(client, name, run):
    model, then, _ = run
    digests = pin(model, "newest")
    frozen = convert_batchnorm(copy.deepcopy(then), client, name, expect=digests, compute="local")
    frozen(X)
    model.train()(X)
    with pytest.raises(DigestMismatch):
        frozen(X)


@pytest.mark.parametrize(
    "arguments",
    [
        {"existing": "error"},
        {"existing": "adopt"},
        {"existing": "overwrite"},
        {"non_finite": "allow"},
        {"group": "g", "group_size": 2},
    ],
    ids=str,
)
def test_what_is_for_training_is_refused_beside_at(client, name, run, arguments):
    model = net()
    for frozen in ({"at": "ckpt"}, {"expect": run[2]}):
        with pytest.raises(ValueError, match="only read layers"):
            convert_batchnorm(model, client, name, **frozen, **arguments)
    assert not remotes(model)


def test_an_invalid_tag(client, name):
    with pytest.raises(InvalidRequest):
        convert_batchnorm(net(), client, name, at="a/b")


@pytest.mark.parametrize(
    ("make", "differs"),
    [
        (lambda: nn.BatchNorm1d(4), "num_features"),
        (lambda: nn.BatchNorm2d(3), "dimensions"),
        (lambda: nn.BatchNorm1d(3, affine=False), "affine"),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), "track_running_stats"),
        (lambda: nn.BatchNorm1d(3, dtype=torch.float64), "dtype"),
    ],
)
def test_a_module_that_does_not_fit(client, name, make, differs):
    client.create_layer(name, 3, dimensions=1).pin("a")
    module = make()
    with pytest.raises(ValueError, match=f"does not fit the module: .*{differs}"):
        convert_batchnorm(module, client, name, at="a")


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: nn.BatchNorm1d(3, affine=False), {"affine": False}),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), {"track_running_stats": False}),
        (lambda: nn.BatchNorm1d(3, bias=False), {}),
        (lambda: nn.BatchNorm1d(3), {"statistics": "population"}),
        (lambda: nn.BatchNorm1d(3, eps=0.1), {}),
    ],
    ids=["not affine", "untracked", "without bias", "population", "another eps"],
)
@pytest.mark.parametrize("compute", ["remote", "local"])
def test_every_kind_of_module(client, name, make, options, compute):
    layer = client.create_layer(name, 3, **options)
    layer.train(BATCH)
    tag = layer.pin("a")
    expected = layer.eval(BATCH).output
    layer.train(BATCH + 5)
    frozen = convert_batchnorm(make(), client, name, at="a", expect={name: tag.digest}, compute=compute)
    assert torch.equal(frozen(BATCH), expected)
    assert "at='a'" in repr(frozen)
    state = snapshot(frozen).state_dict()
    assert state._metadata[""]["digest"] == tag.digest
    assert torch.equal(snapshot(frozen).eval()(BATCH), expected)


def test_pins_of_a_model_have_what_was_not_sent(client, name):
    model = convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), client, name, compute="local")
    model[0](BATCH)  # its moments wait
    nn.init.constant_(model[0].weight, 2)
    digests = pin(model, "a")
    kept = client.layer(model[0].name, at="a", expect=digests[model[0].name]).inspect()
    assert (kept.num_batches_tracked, kept.weight) == (1, [2, 2, 2])


def test_pins_that_fail_are_named_and_can_be_repeated(name):
    with serving(max_pins=1) as url, Client(url) as client:
        model = convert_batchnorm(net(), client, name)
        first, *others = [remote.layer for remote in remotes(model)]
        first.pin("full")
        with pytest.raises(TooManyPins) as raised:
            pin(model, "ckpt", key="k")
        assert raised.value.__notes__ == [
            f"not pinned as 'ckpt': {first.name}; {len(others)} of {len(others) + 1} layers are"
        ]
        assert [layer.pins()[0].tag for layer in others] == ["ckpt"] * len(others)
        first.unpin("full")
        assert pin(model, "ckpt").keys() == {first.name, *(layer.name for layer in others)}
        then = snapshot(model, at="ckpt")
        model(X)
        with pytest.raises(PinExists) as raised:
            pin(model, "ckpt")
        assert len(others) == raised.value.__notes__[0].count(",")
        assert_same(snapshot(model, at="ckpt"), then)


def test_a_repeat_under_the_same_key_keeps_the_pins(client, name):
    model = convert_batchnorm(net(), client, name)
    model(X)
    digests = pin(model, "ckpt", key="k")
    model(X)
    assert pin(model, "ckpt", key="k") == digests


def origins(state):
    return {
        entry["layer"]: (entry.get("tag"), entry["digest"]) for entry in state._metadata.values() if "layer" in entry
    }


def test_a_snapshot_says_where_it_comes_from(client, name, run):
    model, then, digests = run
    assert origins(then.state_dict()) == {layer: (None, digest) for layer, digest in digests.items()}
    frozen = convert_batchnorm(copy.deepcopy(then), client, name, at="ckpt")
    tagged = {layer: ("ckpt", digest) for layer, digest in digests.items()}
    for found in (snapshot(model, at="ckpt"), snapshot(frozen)):
        assert origins(found.state_dict()) == tagged
        assert_same(found, then)
    newest = origins(snapshot(model).state_dict())
    assert {layer: digest for layer, (_, digest) in newest.items()} == {
        layer: client.layer(layer).inspect().digest for layer in digests
    }
    assert newest != tagged


def test_it_is_saved_and_loaded(client, name, run, tmp_path):
    model, then, digests = run
    found = snapshot(model, at="ckpt")
    expected = origins(found.state_dict())
    assert len(expected) == len(digests)
    torch.save(found.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert origins(state) == expected
    plain = copy.deepcopy(then)
    plain.load_state_dict(state)
    assert_same(plain, then)
    for copied in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert origins(copied.state_dict()) == expected
    assert origins(found.state_dict(prefix="net.")) == expected
    expect = {layer: digest for layer, (_, digest) in origins(state).items()}
    frozen = convert_batchnorm(plain, client, name, at="ckpt", expect=expect)
    assert torch.equal(frozen(X), then.eval()(X))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train()(X),
        lambda model: nn.init.constant_(model.stem[1].weight, 3),
        lambda model: setattr(model.stem[1], "eps", 0.5),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("meta"),
    ],
    ids=["trained", "weight", "eps", "float64", "bfloat16", "meta"],
)
def test_a_snapshot_that_was_changed_says_it_no_more(run, change):
    _, then, digests = run
    layer = next(entry["layer"] for entry in [then.state_dict()._metadata["stem.1"]])
    assert layer in digests
    change(then)
    assert "layer" not in then.state_dict()._metadata["stem.1"]
    assert layer not in origins(then.state_dict())


def test_a_snapshot_with_what_was_not_sent_has_the_digest_that_sending_gives(client, name):
    norm = RemoteBatchNorm1d(3, client=client, name=name)
    nn.init.constant_(norm.weight, 2)
    norm.eps = 0.25
    state = snapshot(norm).state_dict()
    norm.push()
    assert state._metadata[""]["digest"] == norm.layer.inspect().digest


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_snapshot_can_still_be_exported(run):
    _, then, _ = run
    for exported in (torch.jit.trace(then, X), torch.jit.script(then)):
        file = io.BytesIO()
        torch.jit.save(exported, file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(X), then(X))
    assert torch.equal(torch.export.export(then, (X,)).module()(X), then(X))


def test_a_thousand_wrong_pairs_of_checkpoint_and_model(client, name):
    """No model is converted with another checkpoint's digests."""
    made = []
    for number in range(4):
        model = convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), client, f"{name}{number}.")
        for step in range(8):
            model(BATCH * (number + 1) + step)
            made.append((number, f"ckpt-{step}", *pin(model, f"ckpt-{step}").values()))
    assert len({digest for *_, digest in made}) == 32
    wrong = list(itertools.permutations(made, 2))
    refused = 0
    for (number, tag, _), (*_, digest) in wrong:
        with pytest.raises(DigestMismatch):
            convert_batchnorm(
                nn.BatchNorm1d(3), client, f"{name}{number}.0", at=tag, expect={f"{name}{number}.0": digest}
            )
        refused += 1
    assert refused == len(wrong) == 992
