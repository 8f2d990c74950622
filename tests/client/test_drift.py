"""`layer.drift()` and `batchnorm drift`."""

import json

import numpy as np
import pytest

from batchnorm_client import LayerNotFound


def batches(count, mean=0.0):
    rng = np.random.default_rng(count)
    return [rng.normal(mean, 1, (32, 3)).astype(np.float32) for _ in range(count)]


@pytest.fixture
def layer(other, name):
    layer = other.create_layer(name, 3)
    for batch in batches(30):
        layer.train(batch)
    return layer


def test_drift(layer):
    found = layer.drift()
    assert (found.batches, found.drifting, found.since) == (29, False, None)
    assert found.worst is not None
    for batch in batches(10, 5.0):
        layer.eval(batch)
    found = layer.drift()
    assert (found.batches, found.drifting) == (39, True)
    assert found.score > found.threshold
    assert found.since is not None
    assert len(found.channels.z) == len(found.channels.log_var_ratio) == 3
    assert min(found.channels.z) > 3


def test_drift_of_a_layer_that_is_not_there(other):
    with pytest.raises(LayerNotFound):
        other.layer("not-there").drift()


def test_the_command(run, layer):
    told, found = json.loads(run("drift", layer.name, "--json").stdout), json.loads(layer.drift().model_dump_json())
    assert list(told) == list(found)
    assert (told["batches"], told["drifting"], told["threshold"]) == (29, False, 0.5)
    assert told["channels"]["z"] == pytest.approx(found["channels"]["z"], abs=1e-6)  # rounded when they were saved
    quiet = run("drift", layer.name).stdout
    assert "drift         none" in quiet
    for batch in batches(10, 5.0):
        layer.eval(batch)
    text = run("drift", layer.name).stdout
    assert layer.name in text
    assert "since 20" in text
    assert "39 compared" in text
    assert "drift begins at 0.5" in text
    assert f"channel {layer.drift().worst.channel}:" in text
    assert len(run("drift", layer.name, "--channels").stdout.splitlines()) > 3 + len(text.splitlines()) - 2
    run("drift", "not-there", code=3)


def test_the_command_of_a_new_layer(run, other, name):
    other.create_layer(name, 2)
    assert "0 compared" in run("drift", name).stdout
