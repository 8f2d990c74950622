"""What `import batchnorm_client` brings, and what it does not."""

import pickle
import re
import subprocess
import sys

import pytest

import batchnorm_client
from batchnorm_client import options
from batchnorm_client.wire import errors
from batchnorm_client.wire.documents import LayerConfig, LayerUpdate

CLIENTS = {"AsyncClient", "AsyncFollower", "AsyncRemoteLayer", "Client", "Follower", "RemoteLayer", "Retry"}
RESULTS = {
    "BatchStatistics",
    "EvalResult",
    "FoldResult",
    "Gradients",
    "Drift",
    "HistoryEntry",
    "Layer",
    "LayerConfig",
    "LayerStates",
    "LayerSummary",
    "Pin",
    "Replaced",
    "TrainResult",
}
OPTIONS = {"LayerChanges", "LayerOptions"}
EXCEPTIONS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


def test_public_names():
    assert set(batchnorm_client.__all__) == CLIENTS | RESULTS | OPTIONS | EXCEPTIONS | {"PROBLEMS"}
    assert all(hasattr(batchnorm_client, name) for name in batchnorm_client.__all__)


def test_import_is_light():
    program = """
import sys, time
start = time.perf_counter()
import batchnorm_client
took = time.perf_counter() - start
heavy = {"torch", "httpx", "typer", "rich", "batchnorm_service", "asyncio"} & set(sys.modules)
assert not heavy, heavy
client = batchnorm_client.Client()
client.close()
assert "torch" not in sys.modules
print(f"import batchnorm_client: {took * 1e3:.0f} ms")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


@pytest.mark.parametrize(("typed", "model"), [(options.LayerOptions, LayerConfig), (options.LayerChanges, LayerUpdate)])
def test_no_option_is_forgotten(typed, model):
    assert set(model.model_fields) - {"num_features"} <= set(typed.__annotations__)


def test_every_exception_is_in_the_drawing():
    drawn = {re.split("── ?", line.strip())[-1].split(" ")[0] for line in errors.__doc__.splitlines()}
    assert drawn >= EXCEPTIONS


@pytest.mark.parametrize("name", sorted(EXCEPTIONS))
def test_exceptions_can_be_pickled(name):
    """A worker process's exception has to reach the one that waits for it."""
    error = getattr(errors, name)("what", *([502] if name == "UnexpectedAnswer" else []))
    error.request_id, error.outcome_unknown = "r", True
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == ("what", vars(error))
