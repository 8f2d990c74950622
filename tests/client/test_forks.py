"""A client that was made before a fork: a child that went on with its parent's sockets got its parent's answers."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from batchnorm_client import Client, ConnectionFailed
from client.harness import Relay, environment, serving

PROGRAM = Path(__file__).with_name("forking.py")


@pytest.fixture(scope="module")
def service():
    """A service of its own: the layers have fixed names."""
    with serving() as url:
        yield url


def run(url, way, *certificate):
    done = subprocess.run(
        [sys.executable, PROGRAM, url, way, *certificate],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("way", ["sync", "async", "uvloop"])
def test_each_process_has_connections_of_its_own(service, request, way, secure):
    """And the parent keeps its own, whatever its children do with the client."""
    context = request.getfixturevalue("tls") if secure else None
    with contextlib.closing(Relay(service, context)) as relay:
        run(relay.url, way, *([request.getfixturevalue("certificate")] if secure else []))
        assert relay.accepted == (2 if way != "sync" else 1) + 3  # a sync client made the layers


@pytest.mark.parametrize("way", ["busy", "locked", "torch", "waiting", "follow"])
def test_whatever_goes_on_when_it_forks(service, way):
    run(service, way)


def test_an_http_client_that_was_passed_in_is_refused_in_a_child(monkeypatch):
    """What it shares with the parent is not known here."""
    with httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200))) as http:
        client = Client("http://h", http=http)
        assert client.ready()
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(ConnectionFailed, match="before the fork"):
            client.layer("bn").inspect()
