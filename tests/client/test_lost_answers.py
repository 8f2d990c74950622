"""Answers that get lost between a real service and both clients: nothing counts twice, nothing is undone."""

import httpx
import numpy as np
import pytest

from batchnorm_client import ConnectionFailed, NoAnswer, Overloaded, TimedOut, UnexpectedAnswer, VersionMismatch
from batchnorm_client.wire.headers import IDEMPOTENCY_KEY

BATCH = np.array([[1, 2, 3], [4, 5, 7], [-1, 0, 2]], np.float32)
FAULTS = ["unheard", "lost", "refused", 502, 503, 504]


@pytest.fixture
def layer(other, name):
    """A layer with 3 channels, without faults and in somebody else's hands."""
    return other.create_layer(name, 3)


@pytest.fixture
def there(shaky, layer):
    """The handle of an existing layer, on the way that loses answers."""
    return shaky.layer(layer.name)


@pytest.mark.parametrize("fault", FAULTS)
def test_train_counts_once(way, there, layer, fault):
    way.faults = [fault] * 3
    result = there.train(BATCH)
    assert len(way.sent) == 4
    assert len({headers[IDEMPOTENCY_KEY] for headers in way.headers}) == 1
    assert result.num_batches_tracked == layer.inspect().num_batches_tracked == 1
    assert result.replayed == (fault == "unheard")


def test_every_call_has_a_key_of_its_own(way, there):
    there.train(BATCH)
    there.train(BATCH)
    there.reset()
    there.reset(key="mine")
    keys = [headers[IDEMPOTENCY_KEY] for headers in way.headers]
    assert len(set(keys)) == 4
    assert keys[3] == "mine"


def test_reset_happens_once(way, there, layer):
    version = layer.train(BATCH).version
    way.faults = ["unheard", lambda _: layer.train(BATCH)]  # somebody trains before the repeat
    there.reset(if_match=version)
    assert layer.inspect().num_batches_tracked == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_what_only_reads_is_repeated(way, there, shaky, layer, fault):
    for call in (lambda: there.eval(BATCH), there.inspect, there.state_dict, lambda: list(shaky.layers(layer.name))):
        way.faults = [fault]
        call()


def test_create(way, shaky, name):
    way.faults = ["unheard", 503]
    shaky.create_layer(name, 3)
    assert way.sent == [f"PUT {name}"] * 3


def test_errors_are_not_repeated(way, there):
    for status in (500, 501, 400, 429):
        way.faults, way.sent[:] = [status], []
        with pytest.raises(UnexpectedAnswer) as raised:
            there.train(BATCH)
        assert raised.value.status == status
        assert len(way.sent) == 1
    way.sent.clear()
    with pytest.raises(VersionMismatch):
        there.update(eps=1.0, if_match=10**6)
    assert len(way.sent) == 1


def test_update_sets_values(way, there, layer):
    way.faults = ["unheard", "lost"]
    assert there.update(eps=0.5).config.eps == layer.inspect().config.eps == 0.5


CHANGES = [
    {"eps": 0.5, "momentum": None, "non_finite": "allow"},
    {"weight": [0.1, 0.2, 0.3], "bias": np.array([0.1, np.pi, 1e-8])},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_update_with_a_condition_finds_its_own_first_try(way, there, layer, changes):
    version = layer.inspect().version
    way.faults = ["unheard"]
    document = there.update(if_match=version, **changes)
    assert document == layer.inspect()
    assert document.version == version + 1
    assert [sent.split()[0] for sent in way.sent] == ["PATCH", "PATCH", "GET"]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("theirs", [{"eps": 0.25}, {"weight": [1, 2, 4]}])
def test_update_with_a_condition_does_not_take_anothers_for_its_own(way, there, layer, changes, theirs):
    version = layer.inspect().version
    way.faults = ["lost", lambda _: layer.update(**theirs)]
    with pytest.raises(VersionMismatch):
        there.update(if_match=version, **changes)


def test_update_with_a_condition_after_more_changes(way, there, layer):
    """Its own may be among them or not: that cannot be told any more."""
    version = layer.inspect().version
    way.faults = ["unheard", lambda _: layer.train(BATCH)]
    with pytest.raises(VersionMismatch) as raised:
        there.update(eps=0.5, if_match=version)
    assert raised.value.outcome_unknown


def test_a_condition_that_fails_without_doubt(way, there):
    way.faults = ["refused"]
    with pytest.raises(VersionMismatch) as raised:
        there.update(eps=0.5, if_match=10**6)
    assert not raised.value.outcome_unknown
    assert [sent.split()[0] for sent in way.sent] == ["PATCH", "PATCH"]


STATE = {"running_mean": np.array([0.1, np.nan, 3], np.float32), "num_batches_tracked": 7}


def test_load_state_dict_with_a_condition(way, there, layer):
    version = layer.update(non_finite="allow").version
    way.faults = ["unheard"]
    assert there.load_state_dict(STATE, if_match=version).version == version + 1
    way.faults = ["unheard", lambda _: layer.train(BATCH)]
    with pytest.raises(VersionMismatch):
        there.load_state_dict(STATE, if_match=version + 1)
    assert layer.inspect().num_batches_tracked == 8


def test_load_state_dict_without_a_condition_never_undoes_training(way, there, layer):
    way.faults = ["unheard", "lost"]
    with pytest.raises(TimedOut) as raised:
        there.load_state_dict({"num_batches_tracked": 7})
    assert raised.value.outcome_unknown
    assert way.sent == ["PUT state"]
    way.faults = ["refused", "refused"]
    assert there.load_state_dict({"num_batches_tracked": 8}).num_batches_tracked == 8


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("fault", ["unheard", "refused"])
def test_delete_finds_that_it_was_done(way, there, shaky, layer, fault, conditional):
    way.faults = [fault]
    there.delete(if_match=layer.inspect().version if conditional else None)
    assert list(shaky.layers(layer.name)) == []


def test_delete_with_a_condition_spares_the_next_layer_of_that_name(way, there, other, layer):
    version = layer.inspect().version
    way.faults = ["unheard", lambda _: other.create_layer(layer.name, 5)]
    with pytest.raises(VersionMismatch):
        there.delete(if_match=version)
    assert layer.inspect().config.num_features == 5


def test_delete_without_a_condition_looks_before_it_repeats(way, there, other, layer):
    way.faults = ["unheard", lambda _: other.create_layer(layer.name, 5)]
    with pytest.raises(NoAnswer) as raised:
        there.delete()
    assert raised.value.outcome_unknown
    assert "if_match" in raised.value.__notes__[0]
    assert layer.inspect().config.num_features == 5
    assert [sent.split()[0] for sent in way.sent] == ["DELETE", "GET"]


def test_delete_that_did_not_arrive(way, there, layer):
    way.faults = ["lost", 502]  # the look is repeated like every other
    with pytest.raises(ConnectionFailed) as raised:
        there.delete()
    assert raised.value.outcome_unknown
    assert layer.inspect().name == layer.name


def test_a_condition_and_a_layer_that_is_gone_before_the_repeat(way, there, other, layer):
    """Gone, and there again by the time of the look: it is another layer, and this one was deleted."""
    version = layer.inspect().version
    way.faults = ["unheard", None, lambda _: other.create_layer(layer.name, 5)]
    there.delete(if_match=version)
    assert layer.inspect().config.num_features == 5


def test_overloaded_names_its_wait(connect):
    class Full:
        sent = 0

        def __call__(self, request):
            self.sent += 1
            return httpx.Response(
                503,
                json={"type": "/problems/overloaded", "detail": "full"},
                headers={"content-type": "application/problem+json", "retry-after": "3600"},
            )

    full = Full()
    with pytest.raises(Overloaded) as raised:
        connect.over(full).layer("bn").train(BATCH)
    assert (raised.value.retry_after, full.sent) == (3600, 1)
