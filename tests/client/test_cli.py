"""The command `batchnorm` against a real service."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from typer.testing import CliRunner

from batchnorm_client.cli import streams
from batchnorm_client.cli.app import app
from batchnorm_client.cli.output import sparkline
from batchnorm_client.layer import RemoteLayer
from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.errors import ConnectionFailed
from client.harness import environment, serving

BATCH = np.array([[1, 2, 3], [4, 5, 7], [-1, 0, 2]], np.float32)
PROGRAM = [sys.executable, "-W", "error", "-c", "from batchnorm_client.cli import main; main()"]


@pytest.fixture
def layer(other, name):
    return other.create_layer(name, 3)


@pytest.fixture
def data():
    """10 rows of 3 channels."""
    rows = np.random.default_rng(0).normal(3, 2, size=(10, 3)).astype(np.float32)
    np.save("data.npy", rows)
    return rows


def test_layers(run, other, name):
    assert "No layers that start with" in run("layers", "--prefix", name).stdout
    assert json.loads(run("layers", "--prefix", name, "--json").stdout) == []
    for each in (f"{name}.b", f"{name}.a"):
        other.create_layer(each, 2000)
    table = run("layers", "--prefix", name).stdout
    assert table.index(f"{name}.a") < table.index(f"{name}.b")
    assert "2,000" in table
    found = json.loads(run("layers", "--prefix", name, "--json").stdout)
    assert [(each["name"], each["num_batches_tracked"]) for each in found] == [(f"{name}.a", 0), (f"{name}.b", 0)]
    shown = json.loads(run("show", f"{name}.a", "--json").stdout)
    assert {key: shown[key] for key in ("version", "updated_at")} == {
        key: found[0][key] for key in ("version", "updated_at")
    }


def test_show(run, layer):
    mean, var = np.array([[-1, 0.5, 2], [1, 4, 9]], np.float32)
    layer.load_state_dict({"running_mean": mean, "running_var": var})
    shown = run("show", layer.name).stdout
    assert "▁▅█" in shown
    assert "-1 to 2" in shown
    assert "1 to 3" in shown  # the standard deviation
    assert "1 in every channel" in shown
    assert json.loads(run("show", layer.name, "--json").stdout) == json.loads(layer.inspect().model_dump_json())
    assert "0.5" in run("show", layer.name, "--channels").stdout


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"track_running_stats": False, "affine": False}, {"dimensions": 2}]
)
def test_show_other_layers(run, other, name, options):
    other.create_layer(name, 1, **options)
    assert name in run("show", name).stdout


def test_show_of_what_is_not_finite(run, layer):
    layer.update(non_finite="allow")
    layer.load_state_dict({"running_mean": np.array([np.nan, 1, 2], np.float32)})
    assert "x▁█" in run("show", layer.name).stdout
    assert "1 to 2, 1 not finite" in run("show", layer.name).stdout
    assert json.loads(run("show", layer.name, "--json").stdout)["running_mean"] == ["NaN", 1, 2]


@pytest.mark.parametrize("columns", ["24", "40", "80", "200"])
def test_nothing_is_wider_than_the_terminal(run, layer, other, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    wide = other.create_layer(f"{layer.name}.{'long' * 20}", 500)
    wide.train(np.random.default_rng(0).normal(size=(4, 500)).astype(np.float32))
    for shown in (run("show", wide.name), run("layers", "--prefix", layer.name)):
        for line in shown.stdout.splitlines():
            assert len(line) <= int(columns)


def test_create(run, other, name):
    assert f"{name}: 3 channels, 0 batches" in run("create", name, "--num-features", 3).stdout
    run("create", name, "--num-features", 4, code=4)
    options = (
        "--eps 0.5 --momentum none --no-affine --dimensions 2 --channel-axis -1 --dtype float64 --non-finite allow"
    )
    document = json.loads(run("create", f"{name}.x", "--num-features", 3, *options.split(), "--json").stdout)
    config = {name: value for name, value in document["config"].items() if value is not None}
    assert document["config"]["momentum"] is None
    assert config == {
        "num_features": 3,
        "eps": 0.5,
        "statistics": "moving",
        "affine": False,
        "track_running_stats": True,
        "dimensions": 2,
        "channel_axis": -1,
        "dtype": "float64",
        "non_finite": "allow",
    }
    untracked = run("create", f"{name}.y", "--num-features", 3, "--no-track-running-stats", "--momentum", 0.5, "--json")
    assert json.loads(untracked.stdout)["running_mean"] is None


def test_create_has_every_option(run):
    told = run("create", "--help").stdout
    for option in LayerConfig.model_fields:
        assert f"-{option.replace('_', '-')}" in told


def test_create_refuses(run, name):
    assert "neither a number nor none" in run("create", name, "--num-features", 3, "--momentum", "x", code=2).stderr
    assert "eps" in run("create", name, "--num-features", 3, "--eps", -1, code=4).stderr
    assert "layer name" in run("create", "a/b", "--num-features", 3, code=4).stderr
    run("create", name, code=2)


def test_reset(run, layer):
    layer.train(BATCH)
    version = layer.inspect().version
    refused = run("reset", layer.name, "--if-match", version + 1, code=4)
    assert refused.stderr == f"batchnorm: the layer has version {version}, not the one in --if-match\n"
    assert "running statistics set back" in run("reset", layer.name, "--if-match", version).stdout
    assert layer.inspect().num_batches_tracked == 0
    assert json.loads(run("reset", layer.name, "--what", "all", "--json").stdout)["version"] == version + 2
    run("reset", layer.name, "--what", "nothing", code=2)


def test_delete(run, layer):
    refused = run("delete", layer.name, code=2)
    assert refused.stderr.endswith(f"whether to delete {layer.name}; --yes deletes it without asking\n")
    assert "deleted" in run("delete", layer.name, "--yes").stdout
    refused = run("delete", layer.name, "--yes", "--json", code=3)
    assert refused.stderr == f"batchnorm: there is no layer '{layer.name}'\n"


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 0), ("n", 1, 1), ("", 1, 1)])
def test_delete_asks(run, other, layer, monkeypatch, answer, code, left):
    monkeypatch.setattr("batchnorm_client.cli.layers.can_ask", lambda: True)
    result = CliRunner().invoke(app, ["delete", layer.name], input=f"{answer}\n")
    assert result.exit_code == code
    assert "3 channels" in result.stderr
    assert len(list(other.layers(layer.name))) == left


def test_export(run, layer):
    layer.train(BATCH)
    told = run("export", layer.name, "x.safetensors")
    assert "x.safetensors" in told.stdout
    state = layer.state_dict()
    loaded = safetensors.numpy.load_file("x.safetensors")
    assert loaded.keys() == state.keys()
    for key, value in loaded.items():
        np.testing.assert_array_equal(value, state[key])
    module = torch.nn.BatchNorm1d(3)
    module.load_state_dict(safetensors.torch.load_file("x.safetensors"))
    assert module.num_batches_tracked == 1
    assert json.loads(run("export", layer.name, "x.safetensors", "--json").stdout)["tensors"]["weight"] == [3]
    assert os.listdir() == ["x.safetensors"]


@pytest.mark.parametrize("file", [".", "nowhere/x.safetensors", "directory"])
def test_export_to_where_no_file_can_be(run, layer, tmp_path, file):
    """A directory was a traceback; a directory that is missing was told as that of a file nobody had named."""
    (tmp_path / "directory").mkdir()
    refused = run("export", layer.name, file, code=1)
    assert refused.stderr.startswith(f"batchnorm: {file}: ")
    assert len(refused.stderr.splitlines()) == 1
    assert os.listdir() == ["directory"]


def test_a_line_stays_a_line_in_a_pipe(run, layer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert len(run("export", layer.name, "x.safetensors").stdout.splitlines()) == 1


def test_import(run, other, layer):
    layer.train(BATCH)
    layer.update(eps=0.5)
    run("export", layer.name, "x.safetensors")
    run("import", f"{layer.name}.b", "x.safetensors", code=3)
    assert "1 batch," in run("import", f"{layer.name}.b", "x.safetensors", "--create").stdout
    copy, original = other.layer(f"{layer.name}.b").inspect(), layer.inspect()
    assert (copy.running_mean, copy.config) == (original.running_mean, original.config)
    layer.reset()
    version = layer.inspect().version
    run("import", layer.name, "x.safetensors", "--if-match", version + 1, code=4)
    document = json.loads(run("import", layer.name, "x.safetensors", "--if-match", version, "--json").stdout)
    assert (document["version"], document["num_batches_tracked"]) == (version + 1, 1)


def test_import_of_a_modules_file(run, other, name):
    module = torch.nn.BatchNorm1d(5, affine=False).double()
    module(torch.randn(4, 5).double())
    safetensors.torch.save_file(module.state_dict(), "module.safetensors")
    run("import", name, "module.safetensors", "--create")
    document = other.layer(name).inspect()
    assert (document.config.dtype, document.config.affine) == ("float64", False)
    np.testing.assert_array_equal(document.running_mean, module.running_mean)


def test_import_of_something_else(run, layer, tmp_path):
    (tmp_path / "text").write_text("hello")
    safetensors.numpy.save_file({"x": np.zeros((2, 2))}, "other.safetensors")
    for arguments in (["nowhere"], ["text"], ["other.safetensors", "--create"]):
        assert arguments[0] in run("import", layer.name, *arguments, code=2).stderr
    assert "not a safetensors file" in run("import", layer.name, "text", code=2).stderr
    assert "x" in run("import", layer.name, "other.safetensors", code=4).stderr


def test_train(run, layer, data):
    told = run("train", layer.name, "data.npy", "--batch-size", 4)
    assert "3 batches (10 samples)" in told.stdout
    assert told.stderr == ""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    module = torch.nn.BatchNorm1d(3)
    for rows in (data[:4], data[4:8], data[8:]):
        module(torch.from_numpy(rows))
    torch.set_num_threads(threads)
    np.testing.assert_array_equal(layer.state_dict()["running_mean"], module.running_mean)


def test_train_again_under_the_same_id(run, layer, data):
    arguments = ("train", layer.name, "data.npy", "--run-id", "r", "--batch-size", 3, "--drop-last")
    first = json.loads(run(*arguments, "--json").stdout)
    assert (first["batches"], first["samples"], first["replayed"], first["run_id"]) == (3, 9, 0, "r")
    again = json.loads(run(*arguments, "--json").stdout)
    assert (again["replayed"], again["num_batches_tracked"]) == (3, 3)
    assert "3 of which had counted before" in run(*arguments).stdout
    assert "same file" in run("train", layer.name, "data.npy", "--run-id", "r", code=4).stderr
    run("train", layer.name, "data.npy", "--batch-size", 5)
    assert layer.inspect().num_batches_tracked == 5


@pytest.mark.parametrize(("unknown", "done", "offered"), [(True, 0, True), (False, 0, False), (False, 2, True)])
def test_train_offers_to_go_on_where_that_helps(run, layer, data, monkeypatch, unknown, done, offered):
    results = [layer.train(data)] * done

    def train(*_arguments, **_options):
        if results:
            return results.pop()
        raise ConnectionFailed("gone", outcome_unknown=unknown)

    monkeypatch.setattr(RemoteLayer, "train", train)
    told = run("train", layer.name, "data.npy", "--batch-size", 2, "--run-id", "r", code=5).stderr
    assert ("--run-id r goes on" in told) == offered
    assert (f"{done} of 5 batches done" in told) == offered
    assert ("may have taken effect" in told) == unknown
    assert ("BATCHNORM_URL" in told) != unknown


@pytest.mark.parametrize("normalize", ["batch", "running"])
def test_train_writes_what_it_normalized(run, layer, data, client, normalize):
    twin = client.create_layer(f"{layer.name}-twin", 3)
    arguments = ("--batch-size", 4, "--drop-last", "--out", "out.npy", "--normalize", normalize, "--run-id", "r")
    result = json.loads(run("train", layer.name, "data.npy", *arguments, "--json").stdout)
    assert (result["file"], result["samples"], result["batches"]) == ("out.npy", 8, 2)
    expected = [twin.train(rows, normalize=normalize).output for rows in (data[:4], data[4:8])]
    np.testing.assert_array_equal(np.load("out.npy"), np.concatenate(expected))
    again = json.loads(run("train", layer.name, "data.npy", *arguments, "--json").stdout)
    assert again["replayed"] == 2
    newest = twin.eval(data[:8]).output if normalize == "running" else np.concatenate(expected)
    np.testing.assert_array_equal(np.load("out.npy"), newest)
    assert sorted(os.listdir()) == ["data.npy", "out.npy"]


def test_train_leaves_no_half_file(run, layer, data):
    np.save("out.npy", np.zeros(1))
    run("train", layer.name, "data.npy", "--batch-size", 3, "--out", "out.npy", code=4)  # the last batch has one sample
    assert np.load("out.npy").shape == (1,)
    assert "the file that is read" in run("train", layer.name, "data.npy", "--out", "data.npy", code=2).stderr
    assert "--normalize" in run("train", layer.name, "data.npy", "--normalize", "running", code=2).stderr
    assert sorted(os.listdir()) == ["data.npy", "out.npy"]
    assert layer.inspect().num_batches_tracked == 3


@pytest.mark.parametrize("run_id", ["a b", "é", "x" * 181])
def test_train_refuses_a_run_id_that_cannot_travel(run, layer, data, run_id):
    assert "--run-id" in run("train", layer.name, "data.npy", "--run-id", run_id, code=2).stderr


def test_train_converts(run, layer):
    np.save("wide.npy", np.asfortranarray(np.random.default_rng(0).normal(size=(8, 3)).astype(">f8")))
    assert "--dtype converts" in run("train", layer.name, "wide.npy", code=4).stderr
    run("train", layer.name, "wide.npy", "--dtype", "float16")
    assert layer.inspect().num_batches_tracked == 1


def test_train_stops_at_what_is_refused(run, layer, data):
    refused = run("train", layer.name, "data.npy", "--batch-size", 3, "--run-id", "r", code=4)
    assert "3 of 4 batches done; --run-id r goes on" in refused.stderr
    assert "--drop-last" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    np.save("wide.npy", np.zeros((4, 5), np.float32))
    assert "--run-id" not in run("train", layer.name, "wide.npy", code=4).stderr  # nothing to go on with
    np.save("none.npy", data[:0])
    assert json.loads(run("train", layer.name, "none.npy", "--json").stdout)["batches"] == 0


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_eval(run, layer, data, dtype):
    layer.train(data)
    told = run("eval", layer.name, "data.npy", "out.npy", "--batch-size", 4, *(["--dtype", dtype] if dtype else []))
    assert "10 samples written to out.npy, normalized with version" in told.stdout
    out = np.load("out.npy")
    assert out.dtype == (dtype or np.float32)
    np.testing.assert_array_equal(out, layer.eval(data.astype(out.dtype)).output)
    result = json.loads(run("eval", layer.name, "data.npy", "out.npy", "--json").stdout)
    assert (result["shape"], result["versions"]) == ([10, 3], [layer.inspect().version] * 2)
    assert sorted(os.listdir()) == ["data.npy", "out.npy"]


def test_eval_of_nothing(run, layer, data):
    np.save("none.npy", data[:0])
    run("eval", layer.name, "none.npy", "out.npy")
    assert np.load("out.npy").shape == (0, 3)


def test_eval_that_fails_leaves_the_old_file(run, layer, data, tmp_path):
    (tmp_path / "out.npy").write_text("before")
    np.save("narrow.npy", data[:, :2])
    run("eval", layer.name, "narrow.npy", "out.npy", code=4)
    run("eval", f"{layer.name}.no", "data.npy", "out.npy", code=3)
    assert (tmp_path / "out.npy").read_text() == "before"
    assert "nowhere" in run("eval", layer.name, "data.npy", "nowhere/out.npy", code=1).stderr
    assert "another name" in run("eval", layer.name, "data.npy", "./data.npy", code=2).stderr
    assert sorted(os.listdir()) == ["data.npy", "narrow.npy", "out.npy"]


def test_eval_while_the_layer_changes(run, layer, data, monkeypatch):
    whole = streams.Batches.__iter__

    def changing(self):
        for item in whole(self):
            layer.train(data)
            yield item

    monkeypatch.setattr(streams.Batches, "__iter__", changing)
    assert "was changed meanwhile" in run("eval", layer.name, "data.npy", "out.npy", "--batch-size", 5).stderr


@pytest.mark.parametrize("call", ["train", "eval"])
def test_files_that_are_no_data(run, layer, call, tmp_path):
    np.savez("zip.npz", x=BATCH)
    np.save("flat.npy", BATCH[0])
    np.save("objects.npy", np.array([[None]]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:-4])
    (tmp_path / "head.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00garbage")
    for file in ("nowhere.npy", "zip.npz", "flat.npy", "objects.npy", "text.npy", "cut.npy", "head.npy", "."):
        refused = run(call, layer.name, file, *(["out.npy"] if call == "eval" else []), code=2)
        assert refused.stderr.startswith(f"batchnorm: {file}:")


def test_nobody_there(run, layer):
    refused = run("show", layer.name, "--url", "http://127.0.0.1:1", code=5)
    assert refused.stderr.startswith("batchnorm: cannot reach http://127.0.0.1:1")
    assert len(refused.stderr.splitlines()) == 1
    assert "URL" in run("show", layer.name, "--url", "nowhere", code=2).stderr


def test_a_proxy_that_is_not_there(run, layer, monkeypatch):
    """It is of no use then to look at --url."""
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    refused = run("show", layer.name, code=5)
    assert refused.stderr.startswith("batchnorm: cannot reach the proxy http://127.0.0.1:1 (from http_proxy)")
    assert "--url" not in refused.stderr


@pytest.mark.parametrize(("quiet", "warnings"), [(3600, 0), (0, 3)])
def test_only_a_command_that_takes_long_says_what_it_tries_again(run, layer, monkeypatch, caplog, quiet, warnings):
    monkeypatch.setattr("batchnorm_client.cli.service._QUIET_SECONDS", quiet)
    run("show", layer.name, "--url", "http://127.0.0.1:1", code=5)
    assert len(caplog.records) == warnings


def test_batches_that_are_too_large(run, data):
    with serving(max_body_bytes=1024) as small:
        run("create", "bn", "--num-features", 3, "--url", small)
        np.save("large.npy", np.zeros((1000, 3), np.float32))
        refused = run("train", "bn", "large.npy", "--url", small, code=4)
        assert "BATCHNORM_MAX_BODY_BYTES" in refused.stderr
        assert "--batch-size" in refused.stderr


def test_a_token_is_asked_for(run):
    with serving(token="right") as guarded:
        for given in ([], ["--token", "wrong"]):
            refused = run("layers", "--url", guarded, *given, code=4)
            assert refused.stderr.endswith("token; give one with --token-file, --token or BATCHNORM_CLIENT_TOKEN\n")
        run("layers", "--url", guarded, "--token", "right")


def test_where_a_token_comes_from(run, monkeypatch):
    """Arguments before the environment, and there the client's variables before the service's."""
    with serving(token="right") as guarded:
        monkeypatch.setenv("BATCHNORM_URL", guarded)
        for name, content in (("right", "right\n"), ("wrong", "wrong"), ("empty", "\n")):
            Path(name).write_text(content)
        monkeypatch.setenv("BATCHNORM_TOKEN", "right")
        run("layers")
        monkeypatch.setenv("BATCHNORM_CLIENT_TOKEN_FILE", "wrong")
        run("layers", code=4)
        monkeypatch.setenv("BATCHNORM_CLIENT_TOKEN", "right")
        run("layers")
        run("layers", "--token-file", "wrong", code=4)
        monkeypatch.setenv("BATCHNORM_CLIENT_TOKEN", "wrong")
        run("layers", "--token-file", "right")
        run("layers", "--token", "right")
        for arguments, words in (
            (["--token", "right", "--token-file", "right"], "give one of them"),
            (["--token-file", "missing"], "missing: No such file or directory"),
            (["--token-file", "empty"], "the token in empty must be"),
        ):
            assert words in run("layers", *arguments, code=2).stderr


def test_certificates_that_cannot_be_used(run):
    Path("text").write_text("no certificate")
    for arguments, words in (
        (["--cacert", "missing"], "missing: No such file or directory"),
        (["--cacert", "text"], "text: "),
        (["--cert", "missing"], "missing: No such file or directory"),
        (["--cert", "text", "--key", "text"], "text and text: "),
        (["--key", "text"], "--key needs --cert"),
    ):
        assert words in run("layers", *arguments, code=2).stderr


def test_help_and_version(run):
    assert "Exit status" in run("--help").stdout
    assert run("--version").stdout[0].isdigit()
    run("nothing", code=2)


def start(url, *arguments, stderr=subprocess.PIPE):
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(BATCHNORM_URL=url), stdout=subprocess.PIPE, stderr=stderr, text=True
    )


def test_an_interrupted_run_goes_on(url, layer, tmp_path):
    rows = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
    file = tmp_path / "data.npy"
    np.save(file, rows)
    arguments = ("train", layer.name, file, "--batch-size", 4, "--run-id", "r", "--json")
    with start(url, *arguments) as process:
        while layer.inspect().num_batches_tracked < 5:
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), told
    assert "of 1,000 batches done; --run-id r goes on" in told
    with start(url, *arguments) as process:
        out, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert json.loads(out)["num_batches_tracked"] == layer.inspect().num_batches_tracked == 1000
    assert json.loads(out)["replayed"] >= 5


def test_progress_is_for_terminals(url, layer, tmp_path):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32))
    arguments = ("train", layer.name, tmp_path / "data.npy", "--batch-size", 4, "--json")
    terminal, inner = pty.openpty()
    with start(url, *arguments, stderr=inner) as process:
        os.close(inner)
        out = process.stdout.read()
        shown = b""
        while part := read(terminal):
            shown += part
    os.close(terminal)
    assert process.returncode == 0
    assert json.loads(out)["batches"] == 25
    assert b"25/25" in shown


def read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # EIO: the other side is closed
        return b""


def test_what_is_missing_is_named():
    program = "import sys; sys.modules['typer'] = None; from batchnorm_client.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr
        == "batchnorm: typer and rich are missing; install them with: pip install 'batchnorm-service[cli]'\n"
    )


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([1, 2, 3], 10, "▁▅█"),
        ([5], 10, "▄"),
        ([2, 2], 10, "▄▄"),
        ([np.nan, np.inf], 10, "xx"),
        ([-1e308, 1e308, np.nan], 10, "▁█x"),
        ([0, 0, 1, 1, 2, 2], 3, "▁▅█"),
        (range(1000), 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparkline(values, width, line):
    with np.errstate(all="raise"):
        assert sparkline(np.array(values, float), width) == line
