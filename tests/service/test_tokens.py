"""The command `token`, and tokens of a running service."""

import re
import signal
import stat
import sys
import time
from pathlib import Path

import httpx
import pytest

from batchnorm_service.tokens import load_tokens

from .conftest import COMMAND
from .test_command import run

TOKEN = [sys.executable, "-m", "batchnorm_service", "token"]
PRINTED = re.compile(r"^.*admin token.* (\S+)$", re.MULTILINE)


@pytest.fixture
def tokens(tmp_path):
    return tmp_path / "tokens"


def command(tokens, *arguments, code=0):
    done = run(*TOKEN, *arguments, BATCHNORM_TOKENS_FILE=str(tokens))
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def status(url, token, path="/v1/layers"):
    return httpx.get(url + path, headers={"Authorization": f"Bearer {token}"}).status_code


def until_status(expected, url, token):
    """The status within the two seconds that the contract gives, and some for a slow machine."""
    end = time.monotonic() + 10
    while (got := status(url, token)) != expected:
        assert time.monotonic() < end, got
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_start_prints_an_admin_token_once(start, store, tokens, workers):
    arguments = ("--store", store, "--workers", str(workers))
    first = start(*arguments, BATCHNORM_TOKENS_FILE=str(tokens))
    (token,) = PRINTED.findall(first.output)
    assert stat.S_IMODE(tokens.stat().st_mode) == 0o600
    assert token not in tokens.read_text()
    put = httpx.put(f"{first.url}/v1/layers/bn", json={"num_features": 2}, headers={"Authorization": f"Bearer {token}"})
    assert put.status_code == 201
    assert httpx.get(f"{first.url}/v1/layers").status_code == 401
    assert httpx.get(f"{first.url}/readyz").status_code == 200
    assert first.stop() == 0
    assert len(PRINTED.findall(first.output)) == 1
    again = start(*arguments, BATCHNORM_TOKENS_FILE=str(tokens))
    assert "admin token" not in again.output
    assert status(again.url, token) == 200
    assert again.stop() == 0
    assert "admin token" not in again.output


def test_a_running_service_reads_changes(start, tokens):
    service = start("--store", "memory:", BATCHNORM_TOKENS_FILE=str(tokens))
    (admin,) = PRINTED.findall(service.output)
    token = command(tokens, "create", "--scope", "train", "--prefix", "team1.").split()[-1]
    until_status(200, service.url, token)
    headers = {"Authorization": f"Bearer {token}"}
    for name, expected in (("team1.bn", 201), ("team2.bn", 403)):
        url = f"{service.url}/v1/layers/{name}"
        assert httpx.put(url, json={"num_features": 2}, headers=headers).status_code == expected
    listed = command(tokens, "list").splitlines()
    assert [line.split()[1] for line in listed] == ["admin", "train"]
    assert listed[1].endswith("layers team1.*")
    assert token not in "".join(listed)
    token_id = listed[1].split()[0]
    assert command(tokens, "revoke", token_id).startswith(token_id)
    until_status(401, service.url, token)
    assert status(service.url, admin) == 200
    assert token_id not in command(tokens, "list")


def test_a_file_that_is_damaged_while_the_service_runs_changes_nothing(start, tokens):
    service = start("--store", "memory:", BATCHNORM_TOKENS_FILE=str(tokens))
    (admin,) = PRINTED.findall(service.output)
    tokens.write_text("batchnorm-tokens 1\nnonsense\n")
    end = time.monotonic() + 10
    while "line 2" not in service.output and time.monotonic() < end:
        assert status(service.url, admin) == 200
        time.sleep(0.05)
    assert f"{tokens}: line 2" in service.output
    service.stop(signal.SIGTERM)
    refused = run(*COMMAND, "--store", "memory:", BATCHNORM_TOKENS_FILE=str(tokens))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"{tokens}: line 2" in refused.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_file_is_refused_at_start(store, tokens, workers):
    tokens.write_text("batchnorm-tokens 1\nnonsense\n")
    arguments = ("--store", store, "--workers", str(workers))
    done = run(*COMMAND, *arguments, BATCHNORM_TOKENS_FILE=str(tokens))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"batchnorm-service: {tokens}: line 2 ")
    assert len(done.stderr.splitlines()) == 1
    assert not Path(store.removeprefix("sqlite:///")).exists()


def test_the_service_may_listen_everywhere_with_tokens(start, tokens):
    service = start("--store", "memory:", "--host", "0.0.0.0", BATCHNORM_TOKENS_FILE=str(tokens))
    assert "may change every layer" not in service.output
    assert httpx.get(f"{service.url}/v1/layers").status_code == 401


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("create",), 2, "--scope"),
        (("create", "--scope", "write"), 2, "--scope"),
        (("create", "--scope", "train", "--prefix", ".team"), 2, "--prefix"),
        (("create", "--scope", "train", "--prefix", "te am"), 2, "--prefix"),
        (("create", "--scope", "train", "--prefix", ""), 2, "--prefix"),
        (("create", "--scope", "train", "--prefix", "t" * 201), 2, "--prefix"),
        (("list",), 2, "No such file"),
        (("revoke", "0" * 12), 2, "No such file"),
    ],
)
def test_what_is_wrong_is_said(tokens, arguments, code, words):
    assert words in command(tokens, *arguments, code=code)
    assert not tokens.exists()


def test_without_a_file_nothing_is_done():
    done = run(*TOKEN, "create", "--scope", "read")
    assert (done.returncode, done.stdout) == (2, "")
    assert "BATCHNORM_TOKENS_FILE" in done.stderr


def test_who_makes_the_file_is_told_whose_it_is(tokens):
    first, second = (run(*TOKEN, "create", "--scope", "read", "--file", str(tokens)) for _ in range(2))
    owner = tokens.owner()
    assert first.stderr == (
        f"batchnorm-service: {tokens} is new; only user {owner} can read it, so run the service as it\n"
    )
    assert second.stderr == ""


def test_an_unknown_id_is_not_revoked(tokens):
    made = command(tokens, "create", "--scope", "read")
    assert "all layers" in made
    assert "no token with the id" in command(tokens, "revoke", "0" * 12, code=1)
    (stored,) = load_tokens(tokens).values()
    assert made.startswith(stored.id)


def test_it_does_not_wait_for_torch(tokens):
    program = (
        "import sys; from batchnorm_service.cli import app;"
        " app(['token', 'create', '--scope', 'read'], standalone_mode=False);"
        " sys.exit(int('torch' in sys.modules))"
    )
    assert run(sys.executable, "-c", program, BATCHNORM_TOKENS_FILE=str(tokens)).returncode == 0
