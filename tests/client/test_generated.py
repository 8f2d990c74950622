"""The blocking client's source, which is generated."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm_client import AsyncClient, AsyncRemoteLayer, Client, RemoteLayer

GENERATE = Path(__file__).parents[2] / "client" / "generate_sync.py"


def test_it_is_up_to_date():
    done = subprocess.run([sys.executable, GENERATE, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("blocking", "awaited"), [(Client, AsyncClient), (RemoteLayer, AsyncRemoteLayer)])
def test_both_have_the_same_methods_and_documentation(blocking, awaited):
    def public(cls):
        return {name: member for name, member in vars(cls).items() if not name.startswith("_")}

    theirs = public(awaited)
    if "aclose" in theirs:
        theirs["close"] = theirs.pop("aclose")
    assert list(public(blocking)) == list(theirs)
    for name, member in public(blocking).items():
        words = [word for word in ("Async", "async", "await") if word in inspect.getdoc(member)]
        assert not words, name
        if callable(member):
            assert len(inspect.signature(member).parameters) == len(inspect.signature(theirs[name]).parameters)
    assert "As `Client" not in "".join(map(str, map(inspect.getdoc, theirs.values())))
