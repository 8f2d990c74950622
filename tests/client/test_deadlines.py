"""The deadline bounds a call as a whole, also where each byte comes soon after the one before it."""

import itertools
import socket
import ssl
import threading

import httpcore
import httpx
import numpy as np
import pytest

from batchnorm_client import Retry, TimedOut
from batchnorm_client.transport.network import DeadlineBackend, seconds_left

BATCH = np.eye(3, dtype=np.float32)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n"
INTERVAL, LONGEST = 0.01, 20
"""Seconds between two bytes, and until a server gives up, which ends a test of a client without a deadline."""


def dripping(start, stop, *, ask=True):
    """Sends these bytes at once after the request, and then byte by byte."""

    def drip(connection):
        try:
            if ask:
                connection.recv(1 << 16)
            connection.sendall(start)
            for _ in range(int(LONGEST / INTERVAL)):
                if stop.wait(INTERVAL):
                    return
                connection.sendall(b"x")
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client has gone, as it should

    return drip


@pytest.fixture
def stop():
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nx-y: ", HEAD + b"\r\n"], ids=["head", "body"])
def test_an_answer_that_drips(connect, listen, stop, request, secure, start):
    context = request.getfixturevalue("tls") if secure else None
    options = {"verify": False} if secure else {}
    listener = listen(dripping(start, stop), context)
    client = connect(listener.url, retry=Retry(deadline=0.3), **options)
    with pytest.raises(TimedOut, match=r"within the deadline of 0\.3 s") as raised:
        client.layer("bn").train(BATCH)
    assert raised.value.outcome_unknown
    assert listener.accepted == 1


def test_a_handshake_that_drips(connect, listen, stop):
    """The beginning of a TLS record of 16 KiB."""
    listener = listen(dripping(b"\x16\x03\x03\x40\x00", stop, ask=False))
    client = connect(listener.url.replace("http:", "https:"), retry=Retry(deadline=0.3), verify=False)
    with pytest.raises(TimedOut, match=r"within the deadline of 0\.3 s"):
        client.layer("bn").train(BATCH)


@pytest.mark.parametrize("url", ["http://service", "https://service"])
def test_a_proxy_that_drips(connect, listen, stop, url):
    listener = listen(dripping(b"HTTP/1.1 200 OK\r\nx-y: ", stop))
    client = connect(url, retry=Retry(deadline=0.3), proxy=listener.url)
    with pytest.raises(TimedOut, match=r"within the deadline of 0\.3 s"):
        client.layer("bn").train(BATCH)


def test_an_http_client_that_was_passed_in(connect, listen, stop):
    """The client that does not block can be cancelled wherever it waits; the other looks between parts of a body."""
    start = b"HTTP/1.1 200 OK\r\nx-y: " if connect.kind == "async" else HEAD + b"\r\n"
    client = connect(listen(dripping(start, stop)).url, http=connect.http(), retry=Retry(deadline=0.3))
    with pytest.raises(TimedOut, match=r"within the deadline of 0\.3 s"):
        client.layer("bn").train(BATCH)


def test_nobody_takes_the_request(connect, listen):
    """More than the sockets hold between them."""
    client = connect(listen(lambda _: None).url, retry=Retry(deadline=0.3))
    with pytest.raises(TimedOut, match=r"within the deadline of 0\.3 s"):
        client.layer("bn").train(np.zeros((1 << 23, 3), np.float32))


@pytest.fixture
def left():
    """`left(*seconds)`: what the call has left, at each look."""
    tokens = []

    def set_left(*seconds):
        numbers = itertools.chain(seconds, itertools.repeat(seconds[-1]))
        tokens.append(seconds_left.set(lambda: next(numbers)))

    yield set_left
    for token in tokens:
        seconds_left.reset(token)


@pytest.fixture
def stream(listen):
    """A connection to somebody who never reads."""
    url = httpx.URL(listen(lambda _: None).url)
    stream = DeadlineBackend().connect_tcp(url.host, url.port)
    yield stream
    stream.close()


def test_a_write_looks_before_each_part(stream, left):
    """The first part fills the socket, and would have had time; for the second there is none."""
    left(1, 0)
    with pytest.raises(httpcore.WriteTimeout, match="deadline"):
        stream.write(bytes(1 << 24))


def test_a_read_looks_first(stream, left):
    left(0.01)
    with pytest.raises(httpcore.ReadTimeout):
        stream.read(1)
    left(0)
    with pytest.raises(httpcore.ReadTimeout, match="deadline"):
        stream.read(1, timeout=None)


def test_a_timeout_that_is_shorter_counts(stream, left):
    for seconds in (1000, float("inf")):
        left(seconds)
        with pytest.raises(httpcore.ReadTimeout):
            stream.read(1, timeout=0.01)


def test_a_connection_that_was_cut(stream, monkeypatch):
    stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
    with pytest.raises(httpcore.WriteError):
        stream.write(b"x")
    assert stream.read(1) == b""


def resolves_to(monkeypatch, *addresses):
    def getaddrinfo(_host, port, **_options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr("batchnorm_client.transport.network.socket.getaddrinfo", getaddrinfo)


def test_each_address_of_a_host_is_tried(monkeypatch, listen):
    url = httpx.URL(listen(lambda _: None).url)
    resolves_to(monkeypatch, "192.0.2.1", "127.0.0.1")
    tried = []

    def connect_tcp(_self, host, *_arguments):
        tried.append(host)
        if host != "127.0.0.1":
            raise httpcore.ConnectError("nobody there")
        return httpcore.MockStream([])

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect_tcp)
    assert DeadlineBackend().connect_tcp("host", url.port).get_extra_info("socket") is None
    assert tried == ["192.0.2.1", "127.0.0.1"]


def test_no_address_is_tried_after_the_deadline(monkeypatch, left):
    resolves_to(monkeypatch, "192.0.2.1", "192.0.2.2")
    tried = []

    def connect_tcp(_self, host, _port, timeout, *_arguments):
        tried.append((host, timeout))
        raise httpcore.ConnectTimeout("nobody there")

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect_tcp)
    left(2, 0)
    with pytest.raises(httpcore.ConnectTimeout, match="deadline"):
        DeadlineBackend().connect_tcp("host", 80, timeout=5)
    assert tried == [("192.0.2.1", 2)]


def test_a_host_without_an_address(monkeypatch):
    def getaddrinfo(*_arguments, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("batchnorm_client.transport.network.socket.getaddrinfo", getaddrinfo)
    with pytest.raises(httpcore.ConnectError, match="not known"):
        DeadlineBackend().connect_tcp("host", 80)


def test_tls_inside_of_tls_is_not_written_past(certificate, tls, listen):
    """Through an https proxy the socket belongs to the outer TLS: what is written goes through the inner one."""
    seen, done = [], threading.Event()

    def serve(connection):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        inner = tls.wrap_bio(incoming, outgoing, server_side=True)

        def until(step):
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                    incoming.write(connection.recv(1 << 16))
                finally:
                    connection.sendall(outgoing.read())

        until(inner.do_handshake)
        seen.append(until(lambda: inner.read(100)))
        until(lambda: inner.write(b"back"))
        done.set()

    url = httpx.URL(listen(serve, tls).url)
    context = ssl.create_default_context(cafile=certificate)
    stream = DeadlineBackend().connect_tcp(url.host, url.port)
    for _ in range(2):
        stream = stream.start_tls(context, "127.0.0.1")
    stream.write(b"there")
    assert stream.read(100) == b"back"
    assert done.wait(60)
    assert seen == [b"there"]
    stream.close()
