"""Clients that others generate from the OpenAPI document have every call, and work.

The generators are no part of the project's environment: `make test` puts them into `.venv-generators`.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from batchnorm_service.app import create_app
from batchnorm_service.settings import Settings
from batchnorm_service.store.memory import MemoryStore

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parents[1] / ".venv-generators"
PYTHON = ENVIRONMENT / "bin" / "python"
NODE_MODULES = ENVIRONMENT / "node_modules"

needs_python = pytest.mark.skipif(
    not PYTHON.exists(), reason="no openapi-python-client: make .venv-generators/generators.stamp"
)
needs_node = pytest.mark.skipif(
    not (NODE_MODULES.exists() and shutil.which("node")),
    reason="no openapi-typescript: make .venv-generators/generators.stamp, with node and npm",
)


@pytest.fixture(scope="module")
def document():
    return create_app(Settings(), MemoryStore()).app.openapi()


@pytest.fixture
def written(document, tmp_path):
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document))
    return path


def operations(document):
    return {operation["operationId"] for path in document["paths"].values() for operation in path.values()}


def run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def generate(written, *options):
    """The folder with the package `generated`."""
    target = written.parent / "generated"
    command = (PYTHON, "-m", "openapi_python_client", "generate", "--path", written, "--output-path", target)
    run(*command, "--meta", "none", *options)
    return written.parent


def generated_calls(folder):
    # A call whose name is a Python word, or a builtin's, gets an underscore.
    return {path.stem.rstrip("_") for path in (folder / "generated" / "api").glob("*/*.py")} - {"__init__", "__init"}


@needs_python
def test_a_python_client_has_every_call_and_works(document, written, start):
    """Seven calls were left out: a schema that refers to itself is none for openapi-python-client."""
    folder = generate(written)
    assert generated_calls(folder) == operations(document) - {"replace_states"}  # which has no JSON: see the next test
    server = start("--store", "memory:")
    told = json.loads(run(PYTHON, HERE / "calls.py", folder, server.url))
    batch = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    bn = torch.nn.BatchNorm1d(2)

    assert told["created"]["config"]["momentum"] == 0.1  # it was null: a cumulative average in silence
    assert torch.equal(torch.tensor(told["trained"]["output"]), bn(batch))
    assert told["trained"]["num_batches_tracked"] == 1
    torch.testing.assert_close(torch.tensor(told["evaluated"]["output"]), bn.eval()(batch))
    torch.testing.assert_close(torch.tensor(told["inverted"]["output"]), batch)
    # The output has mean 0 and both rows of a channel are one deviation away: its gradient is 0 for this grad_output.
    torch.testing.assert_close(torch.tensor(told["gradients"]["grad_input"]), torch.zeros(2, 2), atol=1e-4, rtol=0)
    assert told["gradients"]["grad_bias"] == [4.0, 8.0]
    assert told["folded"]["num_batches_tracked"] == 2
    assert told["folded_many"]["layers"]["bn"]["num_batches_tracked"] == 3
    assert told["state"]["num_batches_tracked"] == 3
    torch.testing.assert_close(torch.tensor(told["state"]["running_mean"]), batch.mean(0) * (1 - 0.9**3))
    assert told["replaced"]["running_mean"] == [7.0, 8.0]
    config = told["updated"]["config"]
    assert (config["eps"], config["momentum"]) == (0.5, 0.1)  # a PATCH sends no null for what it does not set
    assert told["population"]["config"]["momentum"] is None
    assert told["nobody"]["type"] == "/problems/layer-not-found"


@needs_python
def test_a_python_client_has_binary_bodies_too(document, written, start):
    folder = generate(written, "--config", HERE / "openapi-python-client.yaml", "--fail-on-warning")
    assert generated_calls(folder) == operations(document)
    server = start("--store", "memory:")
    run(PYTHON, HERE / "calls_binary.py", folder, server.url)


@needs_node
def test_a_typescript_client_has_every_call_and_compiles(document, written):
    generated = written.parent / "generated.d.ts"
    command = ("node", NODE_MODULES / "openapi-typescript" / "bin" / "cli.js", written, "--output", generated)
    run(*command, "--default-non-nullable=false")  # a field that has a default may be left out of a request
    (block,) = re.findall(r"^export interface operations \{\n(.*?)^\}", generated.read_text(), re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"^ {4}(\w+): \{$", block, re.MULTILINE)) == operations(document)
    shutil.copy(HERE / "calls.ts", written.parent)
    compiler = NODE_MODULES / "typescript" / "bin" / "tsc"
    run("node", compiler, "--noEmit", "--strict", "--target", "es2022", written.parent / "calls.ts")
