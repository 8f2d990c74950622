"""Proxies: which one is used, and that it is named when it is what fails."""

import httpx
import pytest

from batchnorm_client import ConnectionFailed, Retry, TimedOut
from batchnorm_client.transport.proxies import proxy_for

ONCE = Retry(attempts=1)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for scheme in ("http", "https", "all", "no"):
        for variable in (f"{scheme}_proxy", f"{scheme}_proxy".upper()):
            monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("service", ["http://service", "https://service"])
@pytest.mark.parametrize("source", ["HTTP_PROXY", "ALL_PROXY", "the option proxy"])
def test_a_proxy_that_is_not_there_is_named_and_not_the_service(connect, monkeypatch, service, source):
    options, dead = {}, "http://me:secret@127.0.0.1:1"
    if source == "HTTP_PROXY" and service.startswith("https"):
        source = "HTTPS_PROXY"
    if source.isupper():
        monkeypatch.setenv(source, dead)
    else:
        options["proxy"] = dead
    with pytest.raises(ConnectionFailed) as raised:
        connect(service, retry=ONCE, **options).layer("bn").inspect()
    text = str(raised.value)
    assert text.startswith(f"cannot reach the proxy http://127.0.0.1:1 (from {source}): ")
    assert "service" not in text
    assert "secret" not in text
    assert raised.value.proxy in text


def test_a_proxy_that_refuses_a_tunnel(connect, listen):
    def refuse(connection):
        assert connection.recv(1 << 16).startswith(b"CONNECT service:443 ")
        connection.sendall(b"HTTP/1.1 403 Not here\r\ncontent-length: 0\r\n\r\n")

    proxy = listen(refuse).url
    with pytest.raises(
        ConnectionFailed, match=f"the proxy {proxy} .* did not connect to https://service: 403 Not here"
    ):
        connect("https://service", retry=ONCE, proxy=proxy).layer("bn").inspect()


def test_a_certificate_at_the_end_of_a_tunnel(connect, listen, tls):
    """It is the service's, not the proxy's."""

    def tunnel(connection):
        assert connection.recv(1 << 16).startswith(b"CONNECT 127.0.0.1:443 ")
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with pytest.raises(OSError, match=r"(?i)alert|reset|eof"):
            tls.wrap_socket(connection, server_side=True)

    proxy = listen(tunnel).url
    with pytest.raises(ConnectionFailed, match=f"cannot reach https://127.0.0.1 through the proxy {proxy}") as raised:
        connect("https://127.0.0.1", retry=ONCE, proxy=proxy).layer("bn").inspect()
    assert raised.value.permanent
    assert raised.value.proxy is None


def test_what_goes_wrong_behind_a_proxy_names_both(connect, listen):
    proxy = listen(lambda connection: connection.recv(1 << 16) and connection.shutdown(2)).url
    with pytest.raises(ConnectionFailed, match=f"connection to http://service through the proxy {proxy} .* was cut"):
        connect("http://service", retry=ONCE, proxy=proxy).layer("bn").inspect()
    proxy = listen(lambda _: None).url
    with pytest.raises(TimedOut, match=f"http://service through the proxy {proxy} .* did not answer in time"):
        connect("http://service", retry=ONCE, proxy=proxy, timeout=0.05).layer("bn").inspect()


@pytest.mark.parametrize(
    ("variables", "url", "expected"),
    [
        ({}, "http://h", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://h", "http://p:1 (from HTTP_PROXY)"),
        ({"HTTP_PROXY": "p:1"}, "http://h", "http://p:1 (from HTTP_PROXY)"),
        ({"http_proxy": "http://p:1"}, "http://h", "http://p:1 (from http_proxy)"),
        ({"HTTP_PROXY": "http://p:1"}, "https://h", None),
        ({"HTTPS_PROXY": "http://p:1", "ALL_PROXY": "http://q"}, "https://h", "http://p:1 (from HTTPS_PROXY)"),
        ({"ALL_PROXY": "http://q:2"}, "http://h", "http://q:2 (from ALL_PROXY)"),
        *(
            ({"ALL_PROXY": "http://q:2", "NO_PROXY": bypass}, url, None if direct else "http://q:2 (from ALL_PROXY)")
            for bypass, url, direct in [
                ("*", "http://h", True),
                ("h", "http://h", True),
                ("other, h", "http://h", True),
                ("h", "http://sub.h:8000", True),
                ("h", "http://nh", False),
                ("h:8000", "http://h:8000", True),
                ("h:8000", "http://h:9", False),
                ("127.0.0.1", "http://127.0.0.1:8000", True),
                ("::1", "http://[::1]:8000", True),
            ]
        ),
    ],
)
def test_proxies_of_the_environment(monkeypatch, variables, url, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = proxy_for(httpx.URL(url), None, trust_env=True)
    assert found is None if expected is None else str(found) == f"the proxy {expected}"
    assert proxy_for(httpx.URL(url), None, trust_env=False) is None
