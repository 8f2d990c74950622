"""The command line."""

import re
import shlex
import socket
import subprocess
import sys

import pytest

import batchnorm_service

from .conftest import COMMAND, environment

MIGRATE = [sys.executable, "-m", "batchnorm_service", "migrate", "--from", "sqlite:///a.db", "--to", "sqlite:///b.db"]


def run(*arguments, **variables):
    return subprocess.run(
        arguments, env=environment(**variables), capture_output=True, text=True, timeout=60, check=False
    )


def test_version():
    for command in ([sys.executable, "-m", "batchnorm_service"], [f"{sys.prefix}/bin/batchnorm-service"]):
        done = run(*command, "--version")
        assert (done.returncode, done.stdout.strip()) == (0, batchnorm_service.__version__)


def test_nobody_waits_for_torch_who_does_not_serve():
    loaded = "import sys, batchnorm_service.cli; sys.exit(int('torch' in sys.modules))"
    assert run(sys.executable, "-c", loaded).returncode == 0


def test_only_those_who_use_valkey_wait_for_its_client():
    loaded = "import sys, batchnorm_service.server; sys.exit(int('valkey' in sys.modules))"
    subprocess.run([sys.executable, "-c", loaded], check=True)


def test_without_the_service_installed_it_says_what_is_missing():
    program = "import sys; sys.modules['fastapi'] = None; from batchnorm_service.__main__ import main; main()"
    done = run(sys.executable, "-c", program, "serve", "--store", "memory:")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "batchnorm-service: fastapi is missing; install the service with: pip install 'batchnorm-service[service]'\n"
    )


def test_help_is_short_too():
    assert "serve" in run(sys.executable, "-m", "batchnorm_service", "-h").stdout


def test_without_a_command_it_helps():
    done = run(sys.executable, "-m", "batchnorm_service")
    assert done.returncode == 0
    assert "serve" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "status", "words"),
    [
        (["--store", "mysql://localhost"], {}, 2, "--store: no store has the URL scheme 'mysql'"),
        ([], {"BATCHNORM_STORE": "foo:"}, 2, "BATCHNORM_STORE: no store has the URL scheme 'foo'"),
        (["--store", "sqlite:///:memory:"], {}, 2, "--store: "),
        (["--store", "memory:", "--workers", "2"], {}, 2, "--store: memory: lives in one process"),
        (["--store", "valkey://nowhere:port"], {}, 2, "--store: "),
        (["--store", "sqlite:////proc/nowhere/layers.db"], {}, 1, "/proc/nowhere"),
        (["--device", "cuda:77"], {"BATCHNORM_STORE": "memory:"}, 1, "cuda:77"),
        (["--host", "192.0.2.1", "--store", "memory:", "--insecure"], {}, 1, "192.0.2.1"),
        (["--host", "no such host", "--store", "memory:"], {}, 1, "no such host"),
        (["--port", "70000"], {}, 2, "--port"),
        (["--port", "http"], {}, 2, "--port"),
        (["--device", "tpu"], {}, 2, "--device"),
        (["--colour", "red"], {}, 2, "--colour"),
        ([], {"BATCHNORM_MAX_LAYERS": "many"}, 2, "BATCHNORM_MAX_LAYERS"),
        ([], {"BATCHNORM_TOKEN": "se cret"}, 2, "BATCHNORM_TOKEN"),
        ([], {"BATCHNORM_READ_TOKEN": "secret"}, 2, "BATCHNORM_READ_TOKEN"),
        (["--host", "0.0.0.0", "--store", "memory:"], {}, 2, "--insecure"),
        (["--host", "0.0.0.0", "--store", "memory:", "--workers", "2"], {}, 2, "--insecure"),
        (["--host", "::", "--store", "memory:"], {}, 2, "BATCHNORM_INSECURE"),
        (["--host", "192.0.2.1", "--store", "memory:"], {"BATCHNORM_TOKENS_FILE": ""}, 2, "192.0.2.1"),
        ([], {"BATCHNORM_HOST": "0.0.0.0", "BATCHNORM_INSECURE": "0"}, 2, "0.0.0.0"),
        ([], {"BATCHNORM_SSL_CERTFILE": "/nowhere/cert.pem"}, 2, "/nowhere/cert.pem: No such file"),
        ([], {"BATCHNORM_SSL_KEYFILE": "key.pem"}, 2, "BATCHNORM_SSL_CERTFILE"),
        ([], {"BATCHNORM_SSL_CA_CERTS": "ca.pem"}, 2, "BATCHNORM_SSL_CERTFILE"),
        ([], {"BATCHNORM_TOKENS_FILE": "/dev/null"}, 2, "/dev/null"),
        ([], {"BATCHNORM_TOKENS_FILE": "/proc/nowhere/tokens"}, 2, "/proc/nowhere/tokens"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments, variables, status, words):
    done = run(*COMMAND, *arguments, **variables)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "se cret" not in done.stderr
    if "Usage" not in done.stderr:  # that is typer's own form
        assert len(done.stderr.splitlines()) == 1


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(*COMMAND, "--store", "memory:", "--port", port)
    assert done.returncode == 1
    assert done.stderr == f"batchnorm-service: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


@pytest.mark.parametrize(
    "command", [COMMAND, [*COMMAND, "--workers", "2"], MIGRATE], ids=["serve", "workers", "migrate"]
)
def test_receipts_that_a_retried_commit_may_outlive_are_refused(command, tmp_path):
    """Seen: a commit whose reply was lost was repeated after its receipt had expired, and counted twice."""
    variables = {"BATCHNORM_RECEIPT_SECONDS": "3", "BATCHNORM_STORE_TIMEOUT_SECONDS": "2"}
    done = run(*command, BATCHNORM_STORE=f"sqlite:///{tmp_path}/layers.db", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "batchnorm-service: BATCHNORM_RECEIPT_SECONDS (3) must be at least twice BATCHNORM_STORE_TIMEOUT_SECONDS (2)\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", [None, "s3cret'quoted"])
def test_the_printed_lines_work_at_once(start, store, token):
    variables = {} if token is None else {"BATCHNORM_TOKEN": token}
    process = start("--store", store, BATCHNORM_PROT="1", **variables)
    assert store.removeprefix("sqlite:///") in process.output
    assert f"{process.url}/docs" in process.output
    assert "BATCHNORM_PROT (did you mean BATCHNORM_PORT?)" in process.output
    assert token is None or token not in process.output
    lines = re.findall(r"^ +(curl .*)$", process.output, re.MULTILINE)
    assert len(lines) == 2
    for _ in range(2):  # pasting them again is harmless
        for line in lines:
            done = run("sh", "-c", line.replace("curl ", "curl --silent --fail ", 1), **variables)
            assert done.returncode == 0, done
    assert '"num_batches_tracked":2' in done.stdout
    assert shlex.split(lines[0])


@pytest.mark.parametrize(
    ("host", "variables", "warned"),
    [
        ("0.0.0.0", {"BATCHNORM_INSECURE": "1"}, True),
        ("127.0.0.2", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {"BATCHNORM_TOKEN": "secret"}, False),
    ],
)
def test_an_address_that_others_reach_without_a_token_is_warned_of(start, host, variables, warned):
    process = start("--store", "memory:", "--host", host, **variables)
    assert ("may change every layer: set BATCHNORM_TOKENS_FILE" in process.output) == warned
