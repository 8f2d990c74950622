"""Moments of many layers in one document: read layer by layer, and as they are all at once."""

import json
import random

import numpy as np
import orjson
import pytest

from batchnorm_client.wire.errors import InvalidRequest, ProblemError
from batchnorm_service.rest import many, moments

BODY = {
    "layers": {
        "a": {"count": 4, "mean": [1, 2.5], "var": [0.5, 3]},
        "layer1.0.bn1": {"count": 5, "mean": ["NaN", -1e-30], "var": [0.1, "Infinity"]},
        "b": {"var": [1], "mean": [2], "count": 2},
    }
}


def all_at_once(body):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "read_each_layer", lambda *_: None)
        return moments._many_from_json(body)


def plain(read):
    return {
        layer: tensors.name
        if isinstance(tensors, ProblemError)
        else {name: (tensor.dtype, tensor.shape, bytes(tensor.buffer)) for name, tensor in tensors.items()}
        for layer, tensors in read.items()
    }


@pytest.mark.parametrize("indent", [None, 2])
def test_each_layer_is_read_as_it_is_among_all(indent):
    body = json.dumps(BODY, indent=indent).encode()
    each = many.read_each_layer(body, 10)
    assert list(each) == list(BODY["layers"])
    assert plain(each) == plain(all_at_once(body))
    assert each["layer1.0.bn1"]["mean"].numpy().tolist()[1] == -1e-30
    assert np.isnan(each["layer1.0.bn1"]["mean"].numpy()[0])


@pytest.mark.parametrize(
    "body",
    [
        b'{"layers":{"a":{"count":1},"b":0}}',
        b'{"layers":{"a":-{"count":1}}}',
        b'{"layers":{"a":1{"count":1}}}',
        b'{"layers":{"a":{"count":1}0}}',
        b'{"layers":{"a":{"count":1},"a":{"count":2}}}',
        b'{"layers":{"x{}y":{"count":1}}}',
        b'{"layers":{"a":{"count":"}"}}}',
        b'{"layers":{"a":{"count":1}}, "x": 1}',
        b'{"layers":{"a":{"count":1,}}}',
        b'{"layers":{"a":{"count":1}},}',
        b'{"layer":{"a":{"count":1}}}',
        b'{"layers":[{"count":1}]}',
        b'[{"layers":{"a":{"count":1}}}]',
        b'{"layers":{"a":[{"count":1}]}}',
        b'{"layers":{}}',
        b"{}",
        b"",
    ],
)
def test_what_is_unusual_is_read_at_once(body):
    assert many.read_each_layer(body, 10) is None


@pytest.mark.parametrize("wrong", [b'"mean":[1e400]', b'"gamma":[1]', b'"mean":[[1],[]]', b'"mean":null'])
def test_what_is_wrong_with_one_layer_is_told_of_it(wrong):
    """However many values the other layers have."""
    each = many.read_each_layer(b'{"layers":{"a":{%b},"b":{"count":1}}}' % wrong, 10)
    assert isinstance(each["a"], ProblemError)
    assert each["b"]["count"].numpy() == 1


def test_a_number_too_large_is_the_fault_of_one_layer_however_small_the_body():
    """It was that of all layers, in bodies below 64 KiB."""
    read = moments._many_from_json(b'{"layers":{"a":{"mean":[1e400]},"b":{"count":1}}}')
    assert isinstance(read["a"], InvalidRequest)
    assert read["b"]["count"].numpy() == 1
    with pytest.raises(InvalidRequest, match="float64"):
        moments._many_from_json(b'{"layers":{"a":[1e400]}}')


def test_no_more_layers_are_read_than_may_be():
    body = orjson.dumps({"layers": {f"l{n}": {"count": 1} for n in range(5)}})
    assert many.read_each_layer(body, 4) is None
    assert len(many.read_each_layer(body, 5)) == 5


def test_whatever_is_taken_is_taken_at_once_and_alike():
    """On bodies with a few bytes changed."""
    rng, taken = random.Random(0), 0
    whole = json.dumps(BODY).encode()
    for _ in range(3000):
        body = bytearray(whole)
        start = rng.randrange(len(body))
        body[start : start + rng.randrange(3)] = bytes(rng.choice(b'{}[]:,"0123-. ae') for _ in range(rng.randrange(3)))
        each = many.read_each_layer(body, 10)
        if each is None:
            continue
        taken += 1
        try:
            together = all_at_once(body)
        except InvalidRequest:  # a number that does not fit; layer by layer that is one layer's fault
            assert any(isinstance(read, InvalidRequest) for read in each.values())
            continue
        assert plain(each) == plain(together)
    assert taken > 100
