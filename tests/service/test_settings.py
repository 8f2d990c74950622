"""Settings, and that the docs have each of them."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from batchnorm_service.settings import Settings, unknown_variables

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_docs_have_every_setting_with_its_default():
    rows = dict(re.findall(r"^\| `BATCHNORM_(\w+)` \|[^|]*\| (.+?) \|", DOCS.read_text(), re.MULTILINE))
    assert set(rows) == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        if name != "store":  # a file, elsewhere for every user
            default = "none" if field.default is None else f"`{field.default}`"
            assert rows[name.upper()].startswith(default), name


def test_every_setting_has_a_docstring():
    assert all(field.description for field in Settings.model_fields.values())


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv("BATCHNORM_MAX_BODY_BYTES", "4096")
    monkeypatch.setenv("BATCHNORM_PORT", "1")
    settings = Settings(port=2)
    assert (settings.max_body_bytes, settings.port) == (4096, 2)


def test_the_default_store_is_a_file_of_the_user(monkeypatch):
    monkeypatch.delenv("BATCHNORM_STORE", raising=False)
    assert re.fullmatch(r"sqlite:////.*/layers\.db", Settings().store)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"device": "tpu"},
        {"log_level": "loud"},
        {"max_body_bytes": 0},
        {"receipt_seconds": float("inf")},
        {"receipt_seconds": 19.9},
        {"store_timeout_seconds": 1800.1},
        {"token": ""},
        {"token": "two words"},
        {"token": "caf\u00e9"},
        {"read_token": "alone"},
        {"token": "x" * 4097},
        {"tokens_file": "", "read_token": "alone"},
        {"ssl_keyfile": "key.pem"},
        {"ssl_ca_certs": "ca.pem"},
        {"ssl_keyfile_password": "secret"},
        {"colour": "red"},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Settings(**wrong)


def test_receipts_of_twice_the_stores_timeout_are_enough():
    assert Settings(receipt_seconds=20).receipt_seconds == 2 * Settings().store_timeout_seconds


def test_an_empty_token_file_is_none(monkeypatch):
    monkeypatch.setenv("BATCHNORM_TOKENS_FILE", "")
    assert Settings().tokens_file is None
    assert not Settings().has_tokens
    monkeypatch.setenv("BATCHNORM_TOKENS_FILE", "/tokens")
    assert Settings(read_token="look").has_tokens


def test_a_refused_token_is_not_shown():
    with pytest.raises(ValidationError) as caught:
        Settings(token="secret secret")
    assert "secret secret" not in str(caught.value)


def test_unknown_variables_are_named_with_what_may_be_meant():
    names = ["BATCHNORM_PROT", "BATCHNORM_PORT", "batchnorm_host", "PATH", "BATCHNORM_XYZZY"]
    assert unknown_variables(names) == ["BATCHNORM_PROT (did you mean BATCHNORM_PORT?)", "BATCHNORM_XYZZY"]
