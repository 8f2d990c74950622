"""A real service for the whole session, and clients of both kinds."""

import contextlib
import itertools
import shutil
import ssl
import subprocess

import pytest
from typer.testing import CliRunner

from batchnorm_client import Client
from batchnorm_client.cli.app import app
from client.harness import NOW, Clients, Listener, Way, serving

_names = (f"layer-{number}" for number in itertools.count())


@pytest.fixture(scope="session")
def url():
    """A service that all tests share; each takes layers of its own."""
    with serving() as url:
        yield url


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("BATCHNORM_URL", "BATCHNORM_TOKEN", "BATCHNORM_CLIENT_TOKEN", "BATCHNORM_CLIENT_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["sync", "async"])
def connect(request):
    """`connect(url, **options)` makes a client; every test that uses it runs with both kinds."""
    with contextlib.ExitStack() as stack:
        yield Clients(request.param, stack)


@pytest.fixture
def client(connect, url):
    return connect(url)


@pytest.fixture
def other(url):
    """Somebody else, who may come in the middle of a test's calls."""
    with Client(url, retry=NOW) as client:
        yield client


@pytest.fixture
def name():
    """A name that no other test takes."""
    return next(_names)


@pytest.fixture
def layer(client, name):
    """A layer with 3 channels."""
    return client.create_layer(name, 3)


@pytest.fixture
def run(url, monkeypatch, tmp_path):
    """The command line: `run("show", "bn")` -> the result: exit_code, stdout, stderr."""
    monkeypatch.setenv("BATCHNORM_URL", url)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0, **options):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
        assert result.exit_code == code, (result.output, result.exception)
        if code:
            assert result.stdout == ""
            assert "Traceback" not in result.stderr
        return result

    return run


@pytest.fixture
def way(url):
    way = Way(url)
    yield way
    way.close()


@pytest.fixture
def shaky(connect, way):
    """A client on the way that loses answers."""
    return connect.over(way)


@pytest.fixture
def listen():
    """`listen(behave)` starts a server of bare sockets; `behave(connection)` is done with each."""
    with contextlib.ExitStack() as stack:

        def listen(behave, context=None):
            listener = Listener(behave, context)
            stack.callback(listener.close)
            return listener

        yield listen


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate of 127.0.0.1, signed by itself, and its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is needed to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    name = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    subprocess.run(["openssl", "req", *options.split(), *name], check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "certificate.pem").read_text())
    return both


@pytest.fixture
def tls(certificate):
    """The server's context."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context
