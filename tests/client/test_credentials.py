"""Tokens and certificates of both clients."""

import ssl
import warnings

import pytest

from batchnorm_client import AsyncClient, Client
from batchnorm_client.transport.credentials import find_token, with_ssl_context

NAMES = ["BATCHNORM_CLIENT_TOKEN", "BATCHNORM_CLIENT_TOKEN_FILE", "BATCHNORM_TOKEN"]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(("given", "sent"), [({"token": "a"}, "a"), ({"token_file": "file"}, "b"), ({}, "c")])
def test_the_token_is_sent(kind, given, sent, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("b\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHNORM_CLIENT_TOKEN", "c")
    client = kind("http://h", **given)
    assert client._connections.endpoint._headers["Authorization"] == f"Bearer {sent}"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (("a", "file", "c"), "a"),
        (("a", None, None), "a"),
        ((None, "file", "c"), "b"),
        ((None, None, "c"), "c"),
        (("", "", "c"), "c"),
        (("", "", ""), None),
        ((None, None, None), None),
    ],
)
def test_the_environment(values, found, monkeypatch, tmp_path):
    (tmp_path / "file").write_text(" b \n")
    monkeypatch.chdir(tmp_path)
    for name, value in zip(NAMES, values, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert find_token(None, None, use_environment=True) == found
    assert find_token(None, None, use_environment=False) is None
    assert find_token("given", None, use_environment=True) == "given"


@pytest.mark.parametrize("content", ["", "\n", "a b", "a\nb", "ä", "\x00"])
def test_what_is_in_a_file_is_not_shown(content, tmp_path):
    file = tmp_path / "secret.txt"
    file.write_text(content, "latin-1")
    with pytest.raises(ValueError, match=r"the token in .*secret\.txt must be printable ASCII") as raised:
        Client("http://h", token_file=file)
    assert len(content) < 3 or content not in str(raised.value)


def test_both_are_too_many(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        Client("http://h", token="a", token_file=tmp_path)


def test_a_missing_file():
    with pytest.raises(FileNotFoundError):
        Client("http://h", token_file="/nowhere/token")


def test_files_become_an_ssl_context_without_a_warning(certificate):
    """httpx warns of `verify` with a path and of `cert`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in (
            {"verify": str(certificate)},
            {"verify": certificate, "cert": certificate},
            {"cert": certificate},
        ):
            context = with_ssl_context(options)["verify"]
            assert isinstance(context, ssl.SSLContext)
            assert context.verify_mode == ssl.CERT_REQUIRED
            assert context.check_hostname
        untrusting = with_ssl_context({"verify": False, "cert": str(certificate)})["verify"]
        assert untrusting.verify_mode == ssl.CERT_NONE
        Client("https://h", verify=certificate, cert=(certificate, certificate)).close()


def test_what_httpx_takes_is_left_alone():
    own = ssl.create_default_context()
    assert with_ssl_context({"verify": own, "trust_env": False}) == {"verify": own, "trust_env": False}
    assert with_ssl_context({"verify": False}) == {"verify": False}


def test_a_directory_of_authorities(certificate, tmp_path):
    assert isinstance(with_ssl_context({"verify": tmp_path})["verify"], ssl.SSLContext)
