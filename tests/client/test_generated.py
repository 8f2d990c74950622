"""The blocking client, which is generated. That its source is up to date is a part of `make check`."""

import inspect

import pytest

from batchnorm_client import AsyncClient, AsyncRemoteLayer, Client, RemoteLayer


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
