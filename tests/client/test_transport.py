"""What lies between the clients and httpx: addresses, settings, bodies, errors."""

import gzip
import json
import socket
import ssl

import httpx
import numpy as np
import pytest

from batchnorm_client import AsyncClient, Client, ConnectionFailed, Retry, TimedOut, UnexpectedAnswer
from batchnorm_client.core import Attempts, Request
from batchnorm_client.transport.credentials import with_ssl_context
from batchnorm_client.transport.requests import BLOCK, TIMEOUT, ServiceEndpoint
from client.harness import StoppedClock

BATCH = np.array([[1, 2, 3], [4, 5, 7]], np.float32)
HEADER = b'{"output":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}     '
OUTPUT = len(HEADER).to_bytes(8, "little") + HEADER + BATCH.tobytes()
HEADERS = {
    "content-type": "application/vnd.safetensors",
    "batchnorm-version": "2",
    "num-batches-tracked": "1",
    "batchnorm-digest": f"sha-256:{'0' * 64}",
}


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://h:80/", "http://h"),
        ("https://h/sub/path/", "https://h/sub/path"),
        (None, "http://127.0.0.1:8000"),
    ],
)
def test_base_url(given, base):
    with Client(given) as client:
        assert client.base_url == base


def test_base_url_of_the_environment(monkeypatch):
    monkeypatch.setenv("BATCHNORM_URL", "http://there:1")
    monkeypatch.setenv("BATCHNORM_TOKEN", "secret")
    with Client() as client, httpx.Client(base_url="http://own:2/x/") as own, httpx.Client() as bare:
        assert client.base_url == "http://there:1"
        assert Client(http=own).base_url == "http://own:2/x"
        assert Client(http=bare).base_url == "http://there:1"
        assert Client("http://named", http=own).base_url == "http://named"


@pytest.mark.parametrize("bad", ["", "here", "ftp://h", "http://", "http://h?a=b", "http://h:port", "http://\x00"])
def test_what_is_no_base_url(bad):
    with pytest.raises(ValueError, match="URL"):
        Client(bad)


def test_the_environments_token_is_not_sent_by_a_client_that_was_passed_in(connect, monkeypatch):
    monkeypatch.setenv("BATCHNORM_TOKEN", "secret")
    seen = []

    def handle(request):
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json={"layers": [], "next": None})

    list(connect.over(handle).layers())
    list(connect.over(handle, token="mine").layers())
    assert seen == [None, "Bearer mine"]


@pytest.mark.parametrize("token", ["", "a b", "a\r\nX: y", "ä"])
def test_a_token_that_cannot_be_sent_is_not_shown(token):
    with pytest.raises(ValueError, match="token") as raised:
        Client("http://h", token=token)
    assert not token or token not in str(raised.value)


def test_options_besides_an_http_client():
    with httpx.Client() as http, pytest.raises(TypeError, match="timeout"):
        Client(http=http, timeout=5)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("option", ["headers", "cookies", "params", "http2", "timeuot"])
def test_an_option_that_would_not_be_heeded(kind, option):
    with pytest.raises(TypeError, match=f"^{option}: known are timeout, limits"):
        kind("http://h", **{option: {"a": "b"}})


def test_a_client_that_was_passed_in_stays_open():
    with httpx.Client() as http:
        with Client("http://h", http=http):
            pass
        assert not http.is_closed


def test_httpx_options(connect):
    connect("http://h", timeout=7, limits=httpx.Limits(max_connections=1), trust_env=False, verify=False)
    for options, expected in (({"timeout": 7}, httpx.Timeout(7)), ({}, httpx.Timeout(30, connect=5))):
        attempts = Attempts(Request("GET", "/", lambda _: None), Retry(deadline=None), StoppedClock())
        outgoing = ServiceEndpoint("http://h", None, None, options).build_request(attempts)
        assert outgoing.extensions["timeout"] == expected.as_dict()


def test_a_proxy_that_cannot_be_used_is_refused_at_once(connect):
    with pytest.raises(ValueError, match="nowhere"):
        connect("http://h", proxy="nowhere://h")


def test_a_path_below_the_host(connect):
    paths = []

    def handle(request):
        paths.append(request.url.raw_path)
        return httpx.Response(200, json={"layers": [], "next": None})

    list(connect("http://h/sub/", http=connect.http(transport=httpx.MockTransport(handle))).layers("a&b"))
    assert paths == [b"/sub/v1/layers?limit=1000&prefix=a%26b"]


@pytest.mark.parametrize("size", [0, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_large_bodies_go_in_blocks_without_a_copy(connect, size):
    pieces = [b"head", memoryview(np.zeros(size, np.uint8))]
    with httpx.Client() as http:
        endpoint = ServiceEndpoint("http://h", None, http, {})
        request = Request("POST", "/", lambda _: None, pieces=pieces)
        outgoing = endpoint.build_request(Attempts(request, Retry(), StoppedClock()))
    blocks = list(outgoing.stream)
    assert b"".join(blocks) == b"".join(pieces)
    assert outgoing.headers["content-length"] == str(size + 4)
    if size >= BLOCK:
        assert [type(block) for block in blocks] == [memoryview] * len(blocks)
        assert blocks[1].obj is pieces[1].obj
        assert max(map(len, blocks)) == BLOCK
        assert b"".join(outgoing.stream) == b"".join(pieces)  # a redirect may send it again


@pytest.mark.parametrize("base", ["http://h:81/sub", "http://me:secret@h:81/sub"])
@pytest.mark.parametrize("token", [None, "secret"])
@pytest.mark.parametrize(
    ("method", "headers", "pieces"),
    [
        ("GET", {"If-None-Match": '"1"'}, []),
        ("DELETE", {}, []),
        ("POST", {"Accept": "application/json"}, []),
        ("PUT", {"Content-Type": "x/y"}, [b"ab", b"c"]),
    ],
)
def test_a_client_that_is_made_here_sends_what_httpx_would(base, token, method, headers, pieces):
    endpoint = ServiceEndpoint(base, token, None, {})
    request = Request(method, "/a?b=c", lambda _: None, headers=headers, pieces=pieces)
    outgoing = endpoint.build_request(Attempts(request, Retry(deadline=None), StoppedClock()))
    sent = []

    def handle(request):
        sent.append(request)
        return httpx.Response(200)

    with httpx.Client(transport=httpx.MockTransport(handle), timeout=TIMEOUT) as http:
        http.request(
            method, f"{base}/a?b=c", content=b"".join(pieces) or None, headers={**endpoint._headers, **headers}
        )
    (theirs,) = sent
    theirs.headers.pop("connection")  # what HTTP/1.1 does anyway
    assert (outgoing.method, outgoing.url) == (theirs.method, theirs.url)
    assert dict(outgoing.headers) == dict(theirs.headers)
    assert outgoing.extensions == theirs.extensions
    assert b"".join(outgoing.stream) == b"".join(pieces)


def test_a_client_that_is_made_here_keeps_no_cookies(connect, listen):
    """What would be the first call's cookie is not sent with the second, and no time goes into looking for one."""
    seen = []

    def answer(connection):
        for _ in range(2):
            seen.append(connection.recv(1 << 16))
            connection.sendall(b"HTTP/1.1 200 OK\r\nset-cookie: a=b\r\ncontent-length: 0\r\n\r\n")

    client = connect(listen(answer).url)
    assert client.ready()
    assert client.ready()
    assert [b"cookie" in head.lower() for head in seen] == [False, False]


def test_timeouts_end_at_the_deadline():
    with httpx.Client(timeout=httpx.Timeout(30, connect=None)) as http:
        endpoint = ServiceEndpoint("http://h", None, http, {})
        request = Request("GET", "/", lambda _: None)

        def timeouts(deadline):
            return endpoint.build_request(Attempts(request, Retry(deadline=deadline), StoppedClock())).extensions

        assert timeouts(3)["timeout"] == dict.fromkeys(("connect", "read", "write", "pool"), 3)
        assert timeouts(50)["timeout"] == {"connect": 50, "read": 30, "write": 30, "pool": 30}
        assert timeouts(None)["timeout"] == {"connect": None, "read": 30, "write": 30, "pool": 30}


@pytest.mark.parametrize(
    "headers", [{}, {"content-length": str(len(OUTPUT))}, {"content-length": "5"}, {"content-length": "x"}]
)
def test_answers_of_any_length(connect, headers):
    """The announced length is that of what travels, which may be compressed; or there is none."""

    def handle(_request):
        return httpx.Response(200, content=OUTPUT, headers=HEADERS | headers)

    result = connect.over(handle).layer("bn").eval(BATCH)
    np.testing.assert_array_equal(result.output, BATCH)
    assert result.output.flags.writeable
    assert (result.version, result.num_batches_tracked) == (2, 1)


def test_a_compressed_answer(connect):
    asked = []

    def handle(request):
        asked.append(request.headers["accept-encoding"])
        return httpx.Response(200, content=gzip.compress(OUTPUT), headers=HEADERS | {"content-encoding": "gzip"})

    np.testing.assert_array_equal(connect.over(handle).layer("bn").eval(BATCH).output, BATCH)
    assert asked == ["identity"]


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (OUTPUT[:-1], {}),
        (OUTPUT, {"content-type": "application/json"}),
        (OUTPUT, {"content-type": ""}),
        (OUTPUT, {"batchnorm-version": "two"}),
        (OUTPUT.replace(b"[2,3]", b"[3,2]"), {}),
        (OUTPUT.replace(b"output", b"otherx"), {}),
    ],
)
def test_an_answer_that_cannot_be_read(connect, content, headers):
    def handle(_request):
        return httpx.Response(200, content=content, headers=HEADERS | headers)

    with pytest.raises(UnexpectedAnswer, match="cannot be read"):
        connect.over(handle).layer("bn").eval(BATCH)


def test_nobody_listens(connect):
    client = connect("http://127.0.0.1:1", retry=Retry(attempts=2, wait_initial=0))
    with pytest.raises(ConnectionFailed, match=r"cannot reach http://127\.0\.0\.1:1") as raised:
        client.layer("bn").train(BATCH)
    assert isinstance(raised.value.__cause__, httpx.ConnectError)
    assert raised.value.__notes__ == ["after 2 tries"]
    assert not raised.value.outcome_unknown


def test_a_service_that_does_not_answer(connect, listen):
    listener = listen(lambda _: None)
    client = connect(listener.url, timeout=0.05, retry=Retry(attempts=2, wait_initial=0))
    with pytest.raises(TimedOut, match="did not answer in time") as raised:
        client.layer("bn").train(BATCH)
    assert raised.value.outcome_unknown
    assert listener.accepted == 2


def test_a_service_that_hangs_up(connect, listen):
    def cut(connection):
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
        connection.shutdown(socket.SHUT_RDWR)

    listener = listen(cut)
    client = connect(listener.url, retry=Retry(attempts=3, wait_initial=0))
    with pytest.raises(ConnectionFailed, match="was cut") as raised:
        client.layer("bn").train(BATCH)
    assert raised.value.outcome_unknown
    assert listener.accepted == 3


def test_a_certificate_that_is_not_trusted(connect):
    tries = []

    def handle(request):
        tries.append(request)
        error = httpx.ConnectError("certificate verify failed", request=request)
        raise error from ssl.SSLCertVerificationError("self-signed")

    with pytest.raises(ConnectionFailed, match="certificate"):
        connect.over(handle).layer("bn").train(BATCH)
    assert len(tries) == 1


def test_json_of_the_wire(connect, name):
    """What is not given is left to the service, so that old clients work with newer ones."""
    bodies = []

    def handle(request):
        bodies.append(json.loads(request.content))
        return httpx.Response(400)

    layer = connect.over(handle)
    for call in (
        lambda: layer.create_layer(name, 3),
        lambda: layer.create_layer(name, 3, momentum=None, dimensions=2),
        lambda: layer.layer(name).update(momentum=None, weight=[1, np.inf]),
        lambda: layer.layer(name).reset("all"),
    ):
        with pytest.raises(UnexpectedAnswer):
            call()
    assert bodies == [
        {"num_features": 3},
        {"num_features": 3, "momentum": None, "dimensions": 2},
        {"momentum": None, "weight": [1, "Infinity"]},
        {"what": "all"},
    ]


def test_certificate_authorities_are_read_once():
    """Reading them takes 50 ms, which a client of an http:// URL would pay too."""
    contexts = [with_ssl_context({})["verify"] for _ in range(2)]
    assert contexts[0] is contexts[1]
    assert contexts[0].verify_mode is ssl.CERT_REQUIRED
    assert with_ssl_context({"trust_env": False})["verify"] is not contexts[0]
