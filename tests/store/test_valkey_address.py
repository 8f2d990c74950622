from __future__ import annotations

import pytest

from batchnorm_service.store.base import StoreOptions, StoreRefusedError
from batchnorm_service.store.registry import store_from_url
from batchnorm_service.store.valkey.address import Node, parse_address
from batchnorm_service.store.valkey.store import ValkeyStore


@pytest.mark.parametrize(
    ("url", "shown", "tls", "cluster"),
    [
        ("valkey://host", "valkey://host:6379/0", False, False),
        ("valkey://host:7000/3", "valkey://host:7000/3", False, False),
        ("valkeys://host/", "valkeys://host:6379/0", True, False),
        ("redis://host", "redis://host:6379/0", False, False),
        ("rediss://[::1]:7000", "rediss://[::1]:7000/0", True, False),
        ("valkey+cluster://a:1,b", "valkey+cluster://a:1,b:6379", False, True),
        ("valkeys+cluster://a:1,b:2/0", "valkeys+cluster://a:1,b:2", True, True),
        ("redis+cluster://a", "redis+cluster://a:6379", False, True),
        ("rediss+cluster://a", "rediss+cluster://a:6379", True, True),
        ("VALKEY://host?prefix=staging", "valkey://host:6379/0?prefix=staging", False, False),
    ],
)
def test_a_url_says_where_the_servers_are(url: str, shown: str, tls: bool, cluster: bool) -> None:
    address = parse_address(url)
    assert (address.url, address.tls, address.cluster) == (shown, tls, cluster)
    assert parse_address(address.url) == address
    store = store_from_url(url, StoreOptions(60))
    assert isinstance(store, ValkeyStore)
    assert store.url == shown
    assert not store.exclusive


def test_user_and_password_are_decoded_and_never_shown() -> None:
    address = parse_address("valkeys://m%65:s%40cr%2Fet%25@host:1/2?ca=/etc/ca%20.pem")
    assert (address.user, address.password) == ("me", "s@cr/et%")
    assert (address.nodes, address.database, address.ca) == ((Node("host", 1),), 2, "/etc/ca .pem")
    assert address.url == "valkeys://host:1/2"
    assert "cr/et" not in repr(address)
    only = parse_address("valkey://:secret@host")
    assert (only.user, only.password) == (None, "secret")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("valkey:host", "looks like valkey://host:port/0"),
        ("valkey://", "needs a host"),
        ("valkey://secret:99999", "needs a host"),
        ("valkey://secret:0", "needs a host"),
        ("valkey://user:secret@", "needs a host"),
        ("valkey://user:secret@ho st", "needs a host"),
        ("valkey://user:secret/x@host", "written %2F, %3F or %40"),
        ("valkey://user:1234/secret@host", "written %2F, %3F or %40"),
        ("valkey://user:secret@more@host", "written %2F, %3F or %40"),
        ("valkey://user:1?prefix=secret@host", "written %2F, %3F or %40"),
        ("valkey://user:secret#@host", "written %23"),
        ("valkey://user:secret%@host", "% itself is written %25"),
        ("valkey://user:secret%ff@host", "% itself is written %25"),
        ("valkey://secret@host", "valkey://:password@host"),
        ("valkey://secret:@host", "valkey://:password@host"),
        ("valkey://user:secret@host/x", "the number of a database"),
        ("valkey://user:secret@host/0/1", "the number of a database"),
        ("valkey://user:secret@a:1,b:2", "valkey+cluster://host:port,host:port"),
        ("valkey+cluster://user:secret@a,b/1", "only database 0"),
        ("valkey+cluster://user:secret@a,,b", "needs a host"),
        ("valkey://user:secret@host?timeout=1", "the options of a Valkey URL are"),
        ("valkey://user:secret@host?prefix=a&prefix=b", "each once"),
        ("valkey://user:secret@host?prefix={a}", "letters, digits"),
        ("valkey://user:secret@host?ca=/x", "encrypted connections"),
        ("valkeys://user:secret@host?ca=x", "absolute path"),
    ],
)
def test_what_it_cannot_mean_is_refused_in_words_without_the_password(url: str, words: str) -> None:
    with pytest.raises(StoreRefusedError) as refused:
        store_from_url(url, StoreOptions(60))
    assert words in str(refused.value)
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_only_servers_with_replicas_can_wait_for_them() -> None:
    with pytest.raises(StoreRefusedError, match="only Valkey and Redis have replicas"):
        store_from_url("memory:", StoreOptions(60, wait_replicas=1))
    store_from_url("valkey://host", StoreOptions(60, wait_replicas=1))
    with pytest.raises(StoreRefusedError, match="above zero"):
        ValkeyStore("valkey://host", connections=0)
    with pytest.raises(StoreRefusedError, match="no negative number"):
        ValkeyStore("valkey://host", wait_replicas=-1)
