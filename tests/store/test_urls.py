from __future__ import annotations

from pathlib import Path

import pytest

from batchnorm_service.store.base import StoreOptions, StoreRefusedError
from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.store.registry import store_from_url
from batchnorm_service.store.sqlite.store import SqliteStore


def test_memory() -> None:
    store = store_from_url("memory:", StoreOptions(60))
    assert isinstance(store, MemoryStore)
    assert store.url == "memory:"
    assert store.exclusive


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///layers.db", "layers.db"),
        ("sqlite:///path/to/file.db", "path/to/file.db"),
        ("sqlite:///./path/../file.db", "file.db"),
        ("sqlite:////var/lib/file.db", "/var/lib/file.db"),
        ("SQLite:////var/lib/file.db", "/var/lib/file.db"),
        ("sqlite:///my%20layers%23%3F%25.db", "my layers#?%.db"),
        ("sqlite:///%C3%A9t%C3%A9.db", "été.db"),
        ("sqlite:///a:b.db", "a:b.db"),
    ],
)
def test_three_slashes_are_relative_and_four_absolute(
    url: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = store_from_url(url, StoreOptions(60))
    assert isinstance(store, SqliteStore)
    assert store.exclusive
    assert store.path == (tmp_path / path).resolve()
    assert store.url.startswith("sqlite:////"), "shows which file is meant, wherever it is read"
    again = store_from_url(store.url, StoreOptions(60))
    assert again.url == store.url


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:", "three slashes"),
        ("sqlite://", "three slashes"),
        ("sqlite:/abs.db", "three slashes"),
        ("sqlite:file.db", "three slashes"),
        ("sqlite://host/file.db", "three slashes"),
        ("sqlite:///", "needs a path"),
        ("sqlite:////", "is a directory"),
        ("sqlite:///data/", "is a directory"),
        ("sqlite:///.", "is a directory"),
        ("sqlite:///data/..", "is a directory"),
        ("sqlite:///:memory:", "keeps nothing"),
        ("sqlite:///%3Amemory%3a", "keeps nothing"),
        ("sqlite:////tmp/:MEMORY:", "keeps nothing"),
        ("sqlite:///file::memory:", "keeps nothing"),
        ("sqlite:///file.db?mode=memory", "takes no options"),
        ("sqlite:///file.db#x", "takes no options"),
        ("sqlite:///file:layers.db", "not another URL"),
        ("sqlite:///FILE%3Alayers.db", "not another URL"),
        ("sqlite:///~/layers.db", "~ is not expanded"),
        ("sqlite:///a%00b.db", "printable"),
        ("sqlite:///a%0Ab.db", "printable"),
        ("sqlite:///a%ff.db", "printable"),
        ("sqlite:///100%.db", "printable"),
        ("memory://", "no name or options"),
        ("memory://x", "no name or options"),
        ("memory:x", "no name or options"),
        ("", "memory: and sqlite:///relative/file.db and sqlite:////absolute/file.db"),
        ("layers.db", "starts with a scheme"),
        ("/var/lib/layers.db", "starts with a scheme"),
        ("sqlite3:///layers.db", "no store has the URL scheme 'sqlite3'; known are memory: and sqlite:///"),
        ("mysql://u:secret@host/db", "known are memory:"),
    ],
)
def test_what_it_cannot_mean_is_refused_in_words(url: str, words: str) -> None:
    with pytest.raises(StoreRefusedError) as refused:
        store_from_url(url, StoreOptions(60))
    assert words in str(refused.value)
    assert "secret" not in str(refused.value)
