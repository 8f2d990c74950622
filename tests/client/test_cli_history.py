"""The commands on kept states: history, rollback, pin, pins, unpin; --at and --expect."""

import json

import numpy as np
import pytest
import safetensors.numpy

BATCH = np.array([[1, 2, 3], [4, 5, 7], [-1, 0, 2]], np.float32)
WRONG = "sha-256:" + "0" * 64


@pytest.fixture
def layer(other, name):
    """Pinned after one batch, then reset."""
    layer = other.create_layer(name, 3)
    layer.train(BATCH)
    layer.pin("ckpt")
    layer.train(BATCH)
    layer.reset()
    return layer


def dumped(documents):
    return [json.loads(document.model_dump_json()) for document in documents]


def test_history(run, layer):
    found = json.loads(run("history", layer.name, "--json").stdout)
    assert found == dumped(layer.history())
    assert json.loads(run("history", layer.name, "--limit", 1, "--json").stdout) == found[:1]
    lines = [line.split() for line in run("history", layer.name).stdout.splitlines()]
    (pinned,) = (line for line in lines if "ckpt" in line)
    assert pinned[0] == str(layer.pins()[0].version)
    newest = next(line for line in lines if line and line[0].isdigit())
    assert (newest[0], newest[-1]) == (str(layer.inspect().version), "reset")


def test_rollback(run, layer):
    (pin,) = layer.pins()
    version = layer.inspect().version
    assert "not the one in --if-match" in run("rollback", layer.name, "ckpt", "--if-match", 1, code=4).stderr
    told = run("rollback", layer.name, "ckpt", "--if-match", version)
    assert told.stdout == f"{layer.name}: back to ckpt; 3 channels, 1 batch, version {version + 1}\n"
    assert layer.inspect().digest == pin.digest
    run("rollback", layer.name, version)
    assert layer.inspect().num_batches_tracked == 0
    document = json.loads(run("rollback", layer.name, pin.version, "--json").stdout)
    assert document == json.loads(layer.inspect().model_dump_json())
    refused = run("rollback", layer.name, "none", code=3)
    assert refused.stderr == f"batchnorm: layer '{layer.name}' has no pin none\n"
    assert "is no version or tag" in run("rollback", layer.name, "a/b", code=4).stderr


def test_pins(run, other, layer):
    newest = layer.inspect()
    told = run("pin", layer.name, "v1.0").stdout
    assert told == f"{layer.name}: version {newest.version} pinned as v1.0, {newest.digest}\n"
    old = next(pin for pin in layer.pins() if pin.tag == "ckpt")
    assert (
        json.loads(run("pin", layer.name, "again", "--version", old.version, "--json").stdout)["digest"] == old.digest
    )
    assert json.loads(run("pins", layer.name, "--json").stdout) == dumped(layer.pins())
    table = run("pins", layer.name).stdout
    rows = [line.split() for line in table.splitlines() if "sha-256:" in line]
    assert [(row[0], row[1]) for row in rows] == [(pin.tag, str(pin.version)) for pin in layer.pins()]
    assert "stands for version" in run("pin", layer.name, "ckpt", code=4).stderr
    assert "is no tag" in run("pin", layer.name, "7", code=4).stderr
    run("pin", layer.name, "more", "--version", 10**6, code=3)
    refused = run("delete", layer.name, "--yes", code=4)
    assert refused.stderr == f"batchnorm: layer '{layer.name}' has pins; --with-pins deletes them, too\n"
    assert run("unpin", layer.name, "again").stdout == f"{layer.name}: pin again deleted\n"
    assert json.loads(run("unpin", layer.name, "ckpt", "--json").stdout)["deleted"] is True
    run("unpin", layer.name, "ckpt", code=3)
    assert [pin.tag for pin in layer.pins()] == ["v1.0"]
    run("delete", layer.name, "--yes", "--with-pins")
    assert list(other.layers(layer.name)) == []


def test_a_layer_without_pins(run, other, name):
    other.create_layer(name, 3)
    assert run("pins", name).stdout == f"{name} has no pins.\n"
    assert json.loads(run("pins", name, "--json").stdout) == []
    for command in ("history", "pins"):
        run(command, f"{name}.none", code=3)


@pytest.mark.parametrize("columns", ["24", "40", "80", "200"])
def test_nothing_is_wider_than_the_terminal(run, layer, monkeypatch, columns):
    layer.pin("a-tag-that-is-rather-long-" * 5)
    monkeypatch.setenv("COLUMNS", columns)
    for shown in (run("history", layer.name), run("pins", layer.name), run("show", layer.name, "--at", "ckpt")):
        for line in shown.stdout.splitlines():
            assert len(line) <= int(columns)
    digest = layer.pins()[-1].digest
    assert digest in "".join(run("pins", layer.name).stdout.split()) or int(columns) < 80


def test_a_kept_state_in_other_commands(run, other, layer):
    np.save("data.npy", BATCH)
    (pin,) = layer.pins()
    kept = other.layer(layer.name, at="ckpt")
    right, wrong = ("--at", "ckpt", "--expect", pin.digest), ("--at", "ckpt", "--expect", WRONG)
    assert json.loads(run("show", layer.name, *right, "--json").stdout)["digest"] == pin.digest
    assert pin.digest in run("show", layer.name, "--at", pin.version).stdout
    run("eval", layer.name, "data.npy", "out.npy", *right)
    np.testing.assert_array_equal(np.load("out.npy"), kept.eval(BATCH).output)
    run("export", layer.name, "x.safetensors", *right)
    np.testing.assert_array_equal(
        safetensors.numpy.load_file("x.safetensors")["running_mean"], kept.state_dict()["running_mean"]
    )
    for command in (("show",), ("eval", "data.npy", "no.npy"), ("export", "no.npy")):
        name, *files = command
        refused = run(name, layer.name, *files, *wrong, code=4)
        assert refused.stderr == (
            f"batchnorm: the state ckpt of layer '{layer.name}' has another digest than --expect: {pin.digest}\n"
        )
        run(name, layer.name, *files, "--expect", pin.digest, code=4)
        run(name, layer.name, *files, "--at", "none", code=3)
        assert "is no digest" in run(name, layer.name, *files, "--expect", "x", code=4).stderr
