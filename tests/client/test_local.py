"""Batches that stay with the caller: equal to the remote ones, and a few bytes on the wire."""

import json

import httpx
import numpy as np
import pytest
import torch

from batchnorm_client import (
    DtypeMismatch,
    FoldResult,
    InvalidRequest,
    LayerNotFound,
    NonFinite,
    ShapeMismatch,
    TooFewValues,
    UnexpectedAnswer,
)
from batchnorm_client.kernels.torch import all_finite

RNG = np.random.default_rng(5)
CONFIGS = {
    "defaults": {},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "population": {"statistics": "population"},
    "clip": {"clip": 0.5},
    "channels last": {"channel_axis": -1},
    "float64": {"dtype": "float64"},
    "float64 population": {"dtype": "float64", "statistics": "population", "half_life": 50.0},
}


def batches(dtype="float32", count=4):
    return [(RNG.normal(seed, 1 + seed, (6, 3, 5, 3)) + 1).astype(dtype) for seed in range(count)]


def twins(client, name, **options):
    """The same layer twice, with parameters that are not the initial ones."""
    found = [client.create_layer(f"{name}.{which}", 3, **options) for which in ("remote", "local")]
    if options.get("affine", True):
        for layer in found:
            layer.update(weight=[0.5, 2.0, -1.25], bias=[1.0, -0.5, 0.1])
    return found


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
def test_train_and_eval_equal_the_remote_ones(client, name, options, kind):
    remote, local = twins(client, name, **options)
    wide = options.get("dtype") == "float64"
    rtol = 1e-13 if wide else 2e-6
    for batch in batches(options.get("dtype", "float32")):
        there, here = (
            getattr(layer, call)(kind(batch), statistics=True)
            for layer, call in ((remote, "train"), (local, "train_local"))
        )
        assert type(here.output) is type(kind(batch))
        assert here.output.dtype == there.output.dtype
        assert here.num_batches_tracked == there.num_batches_tracked
        np.testing.assert_allclose(here.output, there.output, rtol=rtol, atol=rtol)
        for mine, theirs in zip(_fields(here.statistics), _fields(there.statistics), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=rtol)
        if kind is torch.from_numpy:
            assert torch.equal(here.output, there.output)
    ours, theirs = local.state_dict(), remote.state_dict()
    exact = kind is torch.from_numpy and options.get("channel_axis") is None
    for field in theirs:
        # A float64 variance is made biased and unbiased again on its way: two roundings per fold.
        tight = exact and not (wide and field.endswith(("running_var", "m2")))
        np.testing.assert_allclose(ours[field], theirs[field], rtol=0 if tight else rtol, atol=0 if tight else rtol)
    x = kind(batches(options.get("dtype", "float32"), 1)[0])
    there, here = remote.eval(x, statistics=True), local.eval_local(x, statistics=True)
    # Where the statistics are not bit-equal, the outputs that are made of them need not be.
    np.testing.assert_allclose(here.output, there.output, rtol=5 * rtol, atol=5 * rtol)
    assert torch.equal(torch.as_tensor(local.eval(x).output), torch.as_tensor(here.output)) or kind is np.asarray
    assert here.num_batches_tracked == there.num_batches_tracked


def _fields(statistics):
    return statistics.mean, statistics.var, statistics.invstd


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(client, name, dtype):
    remote, local = twins(client, name)
    for batch in batches():
        x = torch.from_numpy(batch).to(dtype)
        assert torch.equal(local.train_local(x).output, remote.train(x).output)
    assert torch.equal(local.eval_local(x).output, local.eval(x).output)


def test_a_large_offset_costs_numpy_no_precision(client, name):
    layer = client.create_layer(name, 2)
    batch = (RNG.normal(size=(500, 2)) + 1e4).astype(np.float32)
    exact = batch.astype(np.float64)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(layer.train_local(batch).output, expected, atol=1e-5)


def test_the_body_of_a_step_is_small_however_large_the_batch(shaky, way, client, name, measured):
    client.create_layer(name, 64)
    layer = shaky.layer(name)
    batch = torch.randn(100, 64, 32, 32)
    assert batch.nbytes > 25_000_000
    sizes = []
    way.faults = [lambda request: sizes.append(len(request.content))] * 2
    output = layer.train_local(batch).output
    assert way.sent == [f"GET {name}", "POST moments"]
    assert sizes[0] == 0
    assert sizes[1] < 10_000
    torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(64), atol=1e-5, rtol=0)
    measured.append(f"train_local: {batch.nbytes / 1e6:.1f} MB batch, C=64: {sum(sizes)} bytes of body sent")


def test_eval_local_reads_the_state_again_only_when_it_changed(shaky, way, client, name):
    other = client.create_layer(name, 3)
    layer, (batch,) = shaky.layer(name), batches(count=1)
    first = layer.eval_local(batch)
    second = layer.eval_local(batch)
    assert "if-none-match" not in way.headers[0]
    assert way.headers[1]["if-none-match"] == f'"{first.version}"'
    np.testing.assert_array_equal(second.output, first.output)
    assert second.version == first.version
    other.train(batch)
    third = layer.eval_local(batch)
    assert (third.version, third.num_batches_tracked) == (first.version + 1, 1)
    np.testing.assert_allclose(third.output, other.eval(batch).output, rtol=1e-5, atol=1e-6)
    other.delete()
    with pytest.raises(LayerNotFound):
        layer.eval_local(batch)


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        (np.ones((4, 2), np.float32), ShapeMismatch),
        (np.ones((4, 3)), DtypeMismatch),
        (np.full((4, 3), np.nan, np.float32), NonFinite),
        (np.full((4, 3), np.inf, np.float32), NonFinite),
        (np.ones((1, 3), np.float32), TooFewValues),
        (np.ones((0, 3), np.float32), TooFewValues),
        ([[1.0, 2.0, 3.0]], TypeError),
    ],
)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_what_the_service_would_refuse_is_refused_here(layer, batch, error, kind):
    before = layer.inspect()
    with pytest.raises(error):
        layer.train_local(batch if isinstance(batch, list) else kind(batch))
    assert layer.inspect() == before


def test_a_layer_may_allow_what_is_not_finite(client, name):
    layer = client.create_layer(name, 1, non_finite="allow")
    assert np.isnan(layer.train_local(np.full((4, 1), np.nan, np.float32)).output).all()
    assert np.isnan(layer.inspect().running_mean).all()


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("call", ["train", "train_local"])
@pytest.mark.parametrize("statistics", ["moving", "population"])
def test_a_variance_that_overflows_the_layers_dtype_is_refused(client, name, statistics, call, kind):
    """Also where the statistics are added up in float64, and fit float32 again with all that was seen before."""
    layer = client.create_layer(name, 1, statistics=statistics)
    layer.fold_moments(1000, [0.0], [1.0])
    with pytest.raises(NonFinite):
        getattr(layer, call)(kind(np.array([[1e20], [2e20]], np.float32)))
    assert layer.inspect().num_batches_tracked == 1


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize(("dtype", "scale"), [("float32", 3e18), ("float64", 1e100)])
def test_variances_are_finite_though_their_norm_is_not(client, name, dtype, scale, kind):
    batch = np.tile(np.array([[scale], [-scale]], dtype), (2, 4096))
    remote, local = (client.create_layer(f"{name}.{which}", 4096, dtype=dtype) for which in ("remote", "local"))
    expected, found = remote.train(kind(batch)), local.train_local(kind(batch))
    np.testing.assert_allclose(np.asarray(found.output), np.asarray(expected.output), rtol=1e-6)
    assert local.inspect().num_batches_tracked == 1


@pytest.mark.parametrize(
    ("dtype", "values", "finite"),
    [
        (torch.float32, [3e38] * 40, True),
        (torch.float16, [6e4] * 40, True),
        (torch.bfloat16, [3e38] * 40, True),
        (torch.float32, [1.0, np.inf], False),
        (torch.float32, [np.inf, 1.0, -np.inf], False),
        (torch.float32, [3e38] * 40 + [np.nan], False),
    ],
)
def test_a_sum_that_overflows_does_not_make_a_batch_infinite(dtype, values, finite):
    assert all_finite(torch.tensor(values, dtype=dtype)) is finite


def test_a_half_precision_output_that_overflows_is_refused(client, name):
    layer = client.create_layer(name, 1)
    layer.update(weight=[1e6])
    with pytest.raises(NonFinite):
        layer.train_local(torch.tensor([[1.0], [2.0]]).half())
    assert layer.inspect().num_batches_tracked == 0


@pytest.mark.parametrize("clip", [70000.0, 3.5e38, 1e308])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_clip_that_the_dtype_does_not_have_is_its_largest_number(client, name, dtype, clip):
    wide = "float64" if dtype == torch.float64 else "float32"
    clipped, plain = (
        client.create_layer(f"{name}.{which}", 3, dtype=wide, clip=bound)
        for which, bound in (("clipped", clip), ("plain", None))
    )
    batch = torch.from_numpy(RNG.normal(size=(8, 3))).to(dtype)
    for x in (batch,) if dtype == torch.bfloat16 else (batch, batch.numpy()):
        for call in ("train_local", "eval_local", "train", "eval"):
            outputs = [getattr(layer, call)(x).output for layer in (clipped, plain)]
            np.testing.assert_array_equal(*(torch.as_tensor(output).double() for output in outputs))
        both = (clipped, plain)
        outputs = [layer.train_local(x, group=f"{type(x).__name__}", size=1).output for layer in both]
        np.testing.assert_array_equal(*(torch.as_tensor(output).double() for output in outputs))
    assert clipped.inspect().num_batches_tracked == plain.inspect().num_batches_tracked


def test_an_empty_batch_and_a_single_value(client, layer, name):
    assert layer.eval_local(np.zeros((0, 3), np.float32)).output.shape == (0, 3)
    assert layer.eval_local(torch.zeros(0, 3)).output.shape == (0, 3)
    untracked = client.create_layer(name + ".untracked", 3, track_running_stats=False)
    assert untracked.eval_local(np.zeros((0, 3), np.float32)).output.shape == (0, 3)
    with pytest.raises(TooFewValues):
        untracked.eval_local(np.zeros((1, 3), np.float32))
    one = client.create_layer(name + ".one", 3, statistics="population")
    assert one.train_local(torch.ones(1, 3)).output.tolist() == [[0, 0, 0]]
    assert one.train_local(np.ones((1, 3), np.float32)).num_batches_tracked == 2


def test_fold_moments_with_a_key_and_with_a_lost_answer(shaky, way, client, name):
    client.create_layer(name, 3, statistics="population")
    layer, data = shaky.layer(name), RNG.normal(size=(7, 3))
    way.faults = ["unheard"]
    first = layer.fold_moments(7, data.mean(0), torch.from_numpy(data.var(0)))
    assert (first.num_batches_tracked, first.replayed, first.count, first.mean) == (1, True, None, None)
    assert layer.fold_moments(1, [1, 2, 3], [0, 0, 0], key="k").replayed is False
    assert layer.fold_moments(1, [1, 2, 3], [0, 0, 0], key="k").replayed is True
    assert way.sent == ["POST moments"] * 4
    document = layer.inspect()
    everything = np.vstack([data, [[1, 2, 3]]])
    np.testing.assert_allclose(document.running_var, everything.var(0, ddof=1), rtol=1e-6)
    assert document.samples_tracked == 8


def test_many_layers_at_once(shaky, way, client, name):
    good, bad = f"{name}.good", f"{name}.bad"
    client.create_layer(good, 2)
    client.create_layer(bad, 3)
    moments = (4, [1.0, 2.0], [1.0, 1.0])
    way.faults = ["unheard"]
    results = shaky.fold_moments({good: moments, bad: moments, f"{name}.none": moments})
    assert way.sent == ["POST moments"] * 2
    assert isinstance(results[good], FoldResult)
    assert (results[good].num_batches_tracked, results[good].replayed) == (1, True)
    assert isinstance(results[bad], ShapeMismatch)
    assert results[bad].fields["expected"] == [3]
    assert isinstance(results[f"{name}.none"], LayerNotFound)
    assert json.dumps(list(results)) == json.dumps([good, bad, f"{name}.none"])
    assert client.layer(bad).inspect().num_batches_tracked == 0


def test_many_layers_with_a_key_each(shaky, way, client, name):
    """Layers that share a key share a call; every key keeps its own layer's batch from counting twice."""
    names = [f"{name}.{number}" for number in range(3)]
    for one in names:
        client.create_layer(one, 2)
    moments = dict.fromkeys(names, (4, [1.0, 2.0], [1.0, 1.0]))
    keys = dict(zip(names, ["k", "other", "k"], strict=True))
    way.faults = [None, "unheard"]
    results = shaky.fold_moments(moments, key=keys)
    assert list(results) == names
    assert [result.replayed for result in results.values()] == [False, True, False]
    assert [headers["idempotency-key"] for headers in way.headers] == ["k", "other", "other"]
    repeated = shaky.fold_moments(moments, key=keys | {names[0]: "new"})
    assert [result.replayed for result in repeated.values()] == [False, True, True]
    assert [client.layer(one).inspect().num_batches_tracked for one in names] == [2, 1, 1]
    assert shaky.fold_moments({}, key={}) == {}


def test_keys_and_moments_of_different_layers_are_refused_before_anything_is_sent(shaky, way, name):
    for key in ({}, {name: "k", f"{name}.more": "k"}):
        with pytest.raises(ValueError, match="different layers"):
            shaky.fold_moments({name: (4, [1.0], [1.0])}, key=key)
    assert not way.sent


def test_an_answer_that_leaves_a_layer_out_is_no_answer(connect):
    client = connect.over(lambda _: httpx.Response(200, json={"layers": {}}))
    with pytest.raises(UnexpectedAnswer, match="the results are those of"):
        client.fold_moments({"a": (4, [1.0], [1.0])})


def test_population_options(client, name):
    layer = client.create_layer(name, 3, statistics="population", half_life=10.0, clip=2.0)
    config = layer.update(half_life=None, clip=3.0).config
    assert (config.statistics, config.momentum, config.half_life, config.clip) == ("population", None, None, 3.0)
    with pytest.raises(InvalidRequest, match="half_life"):
        client.create_layer(name + ".moving", 3, half_life=10.0)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_inverse(client, layer, kind):
    x = kind(RNG.normal(size=(20, 3)).astype(np.float32))
    layer.update(weight=[2.0, 0.5, -1.0], bias=[1.0, 2.0, 3.0])
    layer.train(x)
    back = layer.inverse(layer.eval(x).output)
    assert type(back.output) is type(x)
    np.testing.assert_allclose(back.output, x, atol=1e-5)
    layer.update(weight=[0.0, 1.0, 1.0])
    with pytest.raises(InvalidRequest, match="weight"):
        layer.inverse(x)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_backward_equals_autograd(layer, mode):
    module = torch.nn.BatchNorm1d(3).train(mode == "train")
    x, grad = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    module(x).backward(grad)
    found = layer.backward(x, grad, mode)
    assert torch.equal(found.grad_input, x.grad)
    assert torch.equal(found.grad_weight, module.weight.grad)
    assert torch.equal(found.grad_bias, module.bias.grad)
    numpys = layer.backward(x.detach().numpy(), grad.numpy(), mode)
    np.testing.assert_array_equal(numpys.grad_input, x.grad)
    assert layer.inspect().num_batches_tracked == 0
