"""The states of several layers in one call, by both clients."""

import threading

import numpy as np
import pytest
import torch

from batchnorm_client import InvalidRequest, LayerNotFound, NoAnswer, ShapeMismatch, VersionMismatch

BATCH = np.array([[1, 2, 3], [4, 5, 7], [-1, 0, 2]], np.float32)


@pytest.fixture
def names(other, name):
    names = [f"{name}.{letter}" for letter in "abc"]
    for each in names:
        other.create_layer(each, 3)
    other.layer(names[1]).train(BATCH)
    other.layer(names[2]).update(eps=0.5)
    return names


@pytest.fixture
def first(other, names):
    """The version with which each was created: after layers were deleted, not 1."""
    return other.layer(names[0]).inspect().version


def test_states(client, other, name, names, first):
    for states in (client.states(names), client.states(prefix=f"{name}.")):
        assert list(states.tensors) == list(states.versions) == list(states.configs) == names
        assert list(states.versions.values()) == [first, first + 1, first + 1]
        assert [config.eps for config in states.configs.values()] == [1e-5, 1e-5, 0.5]
        for each in names:
            alone = other.layer(each).state_dict()
            assert states.tensors[each].keys() == alone.keys()
            for tensor, array in alone.items():
                np.testing.assert_array_equal(states.tensors[each][tensor], array)


def test_known_states_are_not_read_again(client, other, names, first):
    known = client.states(names[:2])
    assert client.states(names[:2], known=known) is known
    other.layer(names[0]).train(BATCH)
    now = client.states(names[:2], known=known)
    assert now.versions == {names[0]: first + 1, names[1]: first + 1}
    assert client.states(names[:2], known=now, wait=0.05) is now


def test_waiting_for_other_states(client, other, names, first):
    known = client.states(names)
    timer = threading.Timer(0.1, lambda: other.layer(names[0]).train(BATCH))
    timer.start()
    now = client.states(names, known=known, wait=30)
    timer.join()
    assert now.versions[names[0]] == first + 1


def test_arguments_that_make_no_call(client, names):
    with pytest.raises(ValueError, match="names or prefix"):
        client.states()
    with pytest.raises(ValueError, match="names or prefix"):
        client.states(names, prefix="a")
    with pytest.raises(ValueError, match="known"):
        client.states(names, wait=1)
    with pytest.raises(TypeError, match="one string"):
        client.states(names[0])
    with pytest.raises(InvalidRequest):
        client.states(["a/b"])
    with pytest.raises(ValueError, match="without tensors"):
        client.load_states({}, versions={names[0]: 1})


def test_a_layer_that_does_not_exist(client, names):
    with pytest.raises(LayerNotFound):
        client.states([*names, "missing"])


def test_load_states(client, other, names, first):
    a, b, c = names
    results = client.load_states(
        {
            a: {"weight": np.array([1, 2, 3], np.float32), "num_batches_tracked": 5},
            b: {"bias": torch.ones(3)},
            c: {"bias": torch.ones(4)},
            "missing": {"bias": torch.ones(4)},
        },
        versions={a: first, b: first},
    )
    assert (results[a].version, results[a].num_batches_tracked) == (first + 1, 5)
    assert [type(results[name]) for name in (b, c, "missing")] == [VersionMismatch, ShapeMismatch, LayerNotFound]
    np.testing.assert_array_equal(other.layer(a).inspect().weight, [1, 2, 3])
    assert other.layer(b).inspect().bias == [0, 0, 0]


def test_parameters_are_sent_again_when_the_answer_is_lost(way, shaky, other, names):
    way.faults = ["unheard"]
    results = shaky.load_states({names[0]: {"weight": np.full(3, 2, np.float32)}})
    assert way.sent == ["PUT state"] * 2
    assert results[names[0]].version == other.layer(names[0]).inspect().version


@pytest.mark.parametrize(
    ("tensors", "versions"),
    [({"running_mean": np.ones(3, np.float32)}, {}), ({"bias": np.ones(3, np.float32)}, {0: 1})],
)
def test_statistics_and_versions_are_not_sent_again(way, shaky, names, tensors, versions):
    way.faults = ["unheard"]
    with pytest.raises(NoAnswer) as caught:
        shaky.load_states({names[0]: tensors}, versions={names[place]: version for place, version in versions.items()})
    assert caught.value.outcome_unknown
    assert way.sent == ["PUT state"]
