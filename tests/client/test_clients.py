"""Both clients against a real service: every method, in every kind of array."""

import itertools

import httpx
import numpy as np
import pytest
import torch

from batchnorm_client import (
    DtypeMismatch,
    Forbidden,
    InvalidRequest,
    LayerExists,
    LayerNotFound,
    NonFinite,
    PayloadTooLarge,
    ShapeMismatch,
    TooFewValues,
    Unauthenticated,
    VersionMismatch,
)
from client.harness import serving

BATCH = np.array([[1, 2, 3], [4, 5, 7], [-1, 0, 2]], np.float32)


def reference(*batches, features=3, **options):
    """torch's own layer, fed the same batches by one thread, as in the service."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        module = torch.nn.BatchNorm1d(features, **options)
        outputs = [module(torch.as_tensor(batch)).detach() for batch in batches]
    finally:
        torch.set_num_threads(threads)
    return module, outputs


def test_train(layer):
    module, (expected, _) = reference(BATCH, BATCH * 2)
    before = layer.inspect().version
    first = layer.train(BATCH)
    np.testing.assert_array_equal(first.output, expected)
    assert first.output.dtype == np.float32
    assert first.output.flags.writeable
    assert (first.version, first.num_batches_tracked, first.replayed, first.statistics) == (before + 1, 1, False, None)
    assert layer.train(BATCH * 2).num_batches_tracked == 2
    np.testing.assert_array_equal(layer.state_dict()["running_mean"], module.running_mean)


def test_eval(layer):
    module, _ = reference(BATCH)
    version = layer.train(BATCH).version
    result = layer.eval(BATCH)
    np.testing.assert_allclose(result.output, module.eval()(torch.from_numpy(BATCH)).detach(), rtol=1e-6)
    assert (result.version, result.num_batches_tracked, result.statistics) == (version, 1, None)
    assert layer.inspect().version == version


def test_statistics(layer):
    statistics = layer.train(BATCH, statistics=True).statistics
    np.testing.assert_allclose(statistics.mean, BATCH.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.var, BATCH.var(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.invstd, 1 / np.sqrt(BATCH.var(0) + 1e-5), rtol=1e-6)
    statistics = layer.eval(torch.from_numpy(BATCH), statistics=True).statistics
    assert isinstance(statistics.mean, torch.Tensor)
    np.testing.assert_allclose(statistics.mean, layer.inspect().running_mean, rtol=1e-6)


def test_a_repeat_with_the_same_key(layer):
    first, again = layer.train(BATCH, key="k"), layer.train(torch.from_numpy(BATCH), key="k")
    assert (first.replayed, again.replayed) == (False, True)
    assert again.num_batches_tracked == first.num_batches_tracked == layer.inspect().num_batches_tracked == 1
    np.testing.assert_array_equal(again.output, first.output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("call", ["train", "eval"])
def test_torch_tensors(client, name, call, dtype):
    wide = dtype == torch.float64
    layer = client.create_layer(name, 3, dtype="float64" if wide else "float32")
    batch = torch.from_numpy(BATCH).to(dtype).requires_grad_()
    output = getattr(layer, call)(batch).output
    assert (type(output), output.dtype, output.shape) == (torch.Tensor, dtype, batch.shape)
    assert output.device == batch.device
    assert not output.requires_grad
    output += 1  # it can be written to


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4"])
def test_numpy_dtypes(layer, dtype):
    output = layer.train(BATCH.astype(dtype)).output
    assert output.dtype == np.dtype(dtype)
    np.testing.assert_allclose(output, layer.train(BATCH).output, rtol=2e-3)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_not_contiguous(layer, kind):
    wide = kind(np.repeat(BATCH, 2, axis=1))
    np.testing.assert_array_equal(layer.train(wide[:, ::2]).output, layer.train(BATCH).output)
    np.testing.assert_array_equal(layer.eval(kind(BATCH.T.copy()).T).output, layer.eval(BATCH).output)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_an_empty_batch(layer, kind):
    output = layer.eval(kind(BATCH[:0]), statistics=True).output
    assert output.shape == (0, 3)
    assert type(output) is type(kind(BATCH))
    with pytest.raises(TooFewValues):
        layer.train(kind(BATCH[:0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors(layer):
    batch = torch.from_numpy(BATCH).cuda()
    for result in (layer.train(batch, statistics=True), layer.eval(batch[:, [0, 1, 2]], statistics=True)):
        assert result.output.device == result.statistics.var.device == batch.device
    assert layer.eval(batch[:0]).output.device == batch.device


def test_a_batch_that_goes_in_blocks(client, name):
    layer = client.create_layer(name, 4)
    batch = np.random.default_rng(0).normal(size=(100_000, 4)).astype(np.float32)
    _, (expected,) = reference(batch, features=4)
    np.testing.assert_array_equal(layer.train(batch).output, expected)


def test_create_is_idempotent(client, name):
    client.create_layer(name, 3, momentum=None, eps=1e-3, dimensions=2, non_finite="allow")
    layer = client.create_layer(name, 3, momentum=None, eps=1e-3, dimensions=2, non_finite="allow")
    config = layer.inspect().config
    assert (config.momentum, config.eps, config.dimensions, config.non_finite) == (None, 1e-3, 2, "allow")
    with pytest.raises(LayerExists):
        client.create_layer(name, 4)


def test_create_with_numbers_of_numpy(client, name):
    assert client.create_layer(name, np.int64(3), eps=np.float64(0.5)).inspect().config.eps == 0.5


def test_a_wrong_option(client, name):
    with pytest.raises(InvalidRequest, match="eps") as raised:
        client.create_layer(name, 3, eps=-1)
    assert raised.value.fields["field"] == "eps"
    assert raised.value.request_id
    assert not raised.value.outcome_unknown


def test_update(layer):
    document = layer.update(eps=0.5, momentum=None, weight=BATCH[0], bias=torch.tensor([1.0, 2, 3]).bfloat16())
    assert (document.config.eps, document.config.momentum) == (0.5, None)
    assert (document.weight, document.bias) == ([1, 2, 3], [1, 2, 3])
    document = layer.update(weight=[0.5, 1, 2], track_running_stats=False, if_match=document.version)
    assert document.weight == [0.5, 1, 2]
    with pytest.raises(VersionMismatch) as raised:
        layer.update(eps=1.0, if_match=document.version - 1)
    assert raised.value.fields["expected"] == document.version


@pytest.mark.parametrize(("what", "mean", "weight"), [("running_stats", 0, 2), ("parameters", 1, 1), ("all", 0, 1)])
def test_reset(layer, what, mean, weight):
    state = {"running_mean": np.ones(3, np.float32), "weight": np.full(3, 2, np.float32)}
    version = layer.load_state_dict(state).version
    document = layer.reset(what, if_match=version)
    assert (document.running_mean, document.weight, document.version) == ([mean] * 3, [weight] * 3, version + 1)
    assert layer.reset(what, key="once").version == layer.reset(what, key="once").version


def test_state_goes_to_torch_and_back(layer):
    module, _ = reference(BATCH, BATCH * 2)
    with torch.no_grad():
        module.weight.mul_(2)
    document = layer.load_state_dict(module.state_dict())
    assert (document.num_batches_tracked, document.weight) == (2, [2, 2, 2])
    other = torch.nn.BatchNorm1d(3)
    other.load_state_dict(layer.state_dict(as_torch=True))
    for key, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    state = layer.state_dict()
    assert all(isinstance(value, np.ndarray) and value.flags.writeable for value in state.values())
    assert layer.load_state_dict(state, if_match=document.version).version == document.version + 1
    assert layer.load_state_dict({"num_batches_tracked": 7}).num_batches_tracked == 7


def test_delete(client, layer):
    version = layer.inspect().version
    with pytest.raises(VersionMismatch):
        layer.delete(if_match=version + 1)
    layer.delete(if_match=version)
    for call in (layer.delete, layer.inspect, layer.state_dict, lambda: layer.train(BATCH)):
        with pytest.raises(LayerNotFound):
            call()


def test_layers_goes_over_all_pages(client, name, monkeypatch):
    monkeypatch.setattr("batchnorm_client.core.calls._PAGE", 2)
    names = [f"{name}.{index}" for index in range(5)]
    for each in names:
        client.create_layer(each, 1)
    assert [summary.name for summary in client.layers(prefix=f"{name}.")] == names
    assert [summary.num_features for summary in itertools.islice(client.layers(f"{name}."), 1)] == [1]
    assert list(client.layers(prefix="no-such")) == []


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        (BATCH[:, :2], ShapeMismatch),
        (BATCH.astype(np.float64), DtypeMismatch),
        (BATCH.astype(np.int64), DtypeMismatch),
        (BATCH * np.nan, NonFinite),
        (BATCH[:1], TooFewValues),
        (np.array(1, np.float32), ShapeMismatch),
    ],
)
def test_a_batch_that_does_not_fit(layer, batch, error):
    before = layer.inspect()
    with pytest.raises(error):
        layer.train(batch)
    assert layer.inspect() == before


@pytest.mark.parametrize(
    "batch", [[[1.0]], None, np.array(["a"]), np.ma.array(BATCH), torch.zeros(2, dtype=torch.complex128)]
)
def test_what_is_no_batch(layer, batch):
    with pytest.raises(TypeError):
        layer.train(batch)


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "ä", "a" * 201, "a\n"])
def test_what_no_layer_can_be_called(client, bad):
    for call in (client.layer, lambda name: client.create_layer(name, 1)):
        with pytest.raises(InvalidRequest, match="layer name"):
            call(bad)


@pytest.mark.parametrize("key", ["", "a b", "a\r\nX: y", "ä", "k" * 201])
def test_what_is_no_key(layer, key):
    for call in (lambda: layer.train(BATCH, key=key), lambda: layer.reset(key=key)):
        with pytest.raises(InvalidRequest, match="key"):
            call()


def test_ready(connect, client):
    assert client.ready() is True
    assert connect("http://127.0.0.1:1").ready() is False
    assert connect.over(lambda _: httpx.Response(503)).ready() is False


@pytest.fixture(scope="module")
def guarded_url():
    """A service with tokens and a small limit."""
    with serving(token="secret", read_token="look", max_body_bytes=2048) as url:
        yield url


def test_tokens_and_limits(connect, guarded_url, name, monkeypatch):
    with pytest.raises(Unauthenticated):
        connect(guarded_url).create_layer(name, 3)
    layer = connect(guarded_url, token="secret").create_layer(name, 3)
    with pytest.raises(Forbidden):
        connect(guarded_url, token="look").layer(name).train(BATCH)
    monkeypatch.setenv("BATCHNORM_TOKEN", "look")
    monkeypatch.setenv("BATCHNORM_URL", guarded_url)
    assert connect().layer(name).eval(BATCH).num_batches_tracked == 0
    for rows in (200, 2_000_000):
        with pytest.raises(PayloadTooLarge):
            layer.train(np.zeros((rows, 3), np.float32))


def test_repr(url, layer, client):
    assert url in repr(client)
    assert layer.name in repr(layer)
