"""Moments that are sent together: whatever fails in between, each batch is folded, once, and in order."""

import copy
import json
import threading

import httpx
import pytest
import torch
from torch import nn

from batchnorm_client import Client, LayerNotFound, Overloaded, TimedOut
from batchnorm_client.torch import convert_batchnorm, flush, revert
from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_client.wire.tensors import decode_safetensors, encode
from client.harness import NOW, Way
from client.torch.test_convert import assert_same


class Busy(Way):
    """The way to a service that is overloaded for some layers.

    Attributes:
        overloaded: how many more times moments of a layer are refused, by its name.
    """

    def __init__(self, url):
        super().__init__(url)
        self.overloaded = {}

    def __call__(self, request):
        if request.url.path != "/v1/moments":
            return super().__call__(request)
        tensors, _ = decode_safetensors(request.content)
        names = dict.fromkeys(path.rpartition("/")[0] for path in tensors)
        refused = {name for name in names if self.overloaded.get(name)}
        if not refused:
            return super().__call__(request)
        for name in refused:
            self.overloaded[name] -= 1
        kept = {path: tensor for path, tensor in tensors.items() if path.rpartition("/")[0] not in refused}
        headers = {name: value for name, value in request.headers.items() if name != "content-length"}
        rest = httpx.Request("POST", request.url, content=b"".join(encode(SAFETENSORS, kept)), headers=headers)
        folded = super().__call__(rest).json()["layers"] if kept else {}
        problem = {"type": "/problems/overloaded", "title": "Overloaded", "status": 503, "detail": "busy"}
        problem["instance"] = "/v1/moments"
        answer = {"layers": {name: problem if name in refused else folded[name] for name in names}}
        return httpx.Response(200, content=json.dumps(answer), headers={"Content-Type": "application/json"})


@pytest.fixture
def way(url):
    way = Busy(url)
    yield way
    way.close()


@pytest.fixture
def client(way):
    http = httpx.Client(transport=httpx.MockTransport(way), base_url="http://service")
    with http, Client(http=http, retry=NOW) as client:
        yield client


@pytest.fixture
def models(client, name):
    """Three layers, the last one twice in each forward pass: in the service and torch's own."""
    last = nn.BatchNorm1d(3)
    local = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), last, nn.Linear(3, 3), last)
    return convert_batchnorm(copy.deepcopy(local), client, name, compute="local"), local


@pytest.mark.parametrize("failures", [1, 2, 5])
@pytest.mark.parametrize("layer", ["0", "1", "2"])
def test_a_layer_that_is_overloaded_loses_no_batch_and_nor_do_the_others(models, way, name, layer, failures):
    """Later batches went out under the key of those that waited: 422, and they were gone."""
    model, local = models
    way.overloaded = {name + layer: failures}
    errors = []
    for step in range(6):
        x = torch.randn(8, 3) + step
        try:
            model(x)
        except Overloaded as error:
            errors.append(error)
        local(x)
    assert len(errors) == failures
    assert all(f"layer '{name}{layer}'" in error.__notes__[0] for error in errors)
    flush(model)
    assert_same(model, local)


def test_every_batch_that_waits_has_a_key_of_its_own(models, way):
    """Two calls for a layer that is used twice; what failed is sent again under its first key, beside what is new."""
    model, _ = models
    way.overloaded = {model[0].name: 1}
    with pytest.raises(Overloaded):
        model(torch.randn(8, 3))
    model(torch.randn(8, 3))
    folds = [headers["idempotency-key"] for headers in way.headers if "idempotency-key" in headers]
    assert way.sent[-len(folds) :] == ["POST moments"] * len(folds)
    first, second, again, new, *rest = folds
    assert again == first
    assert len({first, second, new, *rest}) == 3 + len(rest)


def test_a_call_that_failed_on_the_way_and_batches_after_it(models, way):
    model, local = models
    x = torch.randn(8, 3)
    way.faults = ["unheard"] * NOW.attempts
    with pytest.raises(TimedOut):
        model(x)
    local(x)
    for _ in range(2):
        assert torch.equal(model(x), local(x))
    assert_same(model, local)


def test_a_part_that_is_called_by_itself_folds_the_batches_that_waited(models, way):
    model, local = models
    way.overloaded = {model[1].name: 1}
    for step in range(4):
        x = torch.randn(8, 3) + step
        try:
            model[1](x)
        except Overloaded:
            assert step == 1  # the first that sends anything
        local[1](x)
    assert_same(model[1], local[1])


def test_what_is_refused_is_dropped_and_what_comes_after_it_is_not(models, url, name):
    model, _ = models
    with Client(url) as other:
        other.layer(name + "1").delete()
        with pytest.raises(LayerNotFound):
            model(torch.randn(8, 3))
        other.create_layer(name + "1", 3, dimensions=1)
        model(torch.randn(8, 3))
        assert [other.layer(name + n).inspect().num_batches_tracked for n in "012"] == [2, 1, 4]


def test_a_batch_that_comes_while_others_are_sent_is_not_lost(models, client, monkeypatch):
    """Hogwild training: another thread adds moments between a call and its answer."""
    model, _ = models
    fold = client.fold_moments

    def meanwhile(*arguments, **options):
        results = fold(*arguments, **options)
        monkeypatch.undo()
        thread = threading.Thread(target=model[1], args=[torch.randn(8, 3)])
        thread.start()
        thread.join()
        return results

    model[0](torch.randn(8, 3))
    monkeypatch.setattr(client, "fold_moments", meanwhile)
    flush(model)
    flush(model)
    assert [model[place].layer.inspect().num_batches_tracked for place in (0, 1)] == [1, 1]


def test_a_forward_pass_that_fails_sends_what_it_collected(models, way):
    model, _ = models
    hook = model[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(8, 3))
    assert [model[place].layer.inspect().num_batches_tracked for place in (0, 1, 2)] == [1, 1, 1]
    hook.remove()
    way.sent.clear()
    model(torch.randn(8, 3))
    assert way.sent == ["POST moments"] * 2


def test_a_model_that_cannot_be_reverted_goes_on_folding(models, url, name):
    model, _ = models
    with Client(url) as other:
        other.layer(name + "2").delete()
    with pytest.raises(LayerNotFound):
        revert(model)
    model[2] = nn.Identity()
    model[4] = nn.Identity()
    model(torch.randn(8, 3))
    assert [model[place].layer.inspect().num_batches_tracked for place in (0, 1)] == [1, 1]
