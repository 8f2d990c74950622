"""Clients that are closed: before a call, and by another thread or task during one."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from batchnorm_client import ConnectionFailed, Retry

BATCH = np.eye(3, dtype=np.float32)


def test_a_closed_client(connect, url, name, caplog):
    client = connect(url)
    layer = client.create_layer(name, 3)
    client.close()
    client.close()
    for call in (layer.inspect, lambda: layer.train(BATCH), lambda: list(client.layers())):
        with pytest.raises(ConnectionFailed, match="client is closed") as raised:
            call()
        assert raised.value.permanent
        assert not raised.value.outcome_unknown
    assert client.ready() is False
    assert not caplog.records  # it is not tried again


def test_a_closed_http_client_that_was_passed_in(connect, name):
    client = connect.over(lambda _: httpx.Response(200))
    client.close()
    assert client.ready()  # this is left as it is
    http = connect.http()
    client = connect("http://h", http=http)
    connect.close_http(http)
    with pytest.raises(ConnectionFailed, match="passed in is closed"):
        client.layer(name).inspect()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("call", ["inspect", "train"])
def test_a_client_that_is_closed_during_a_call(connect, listen, request, secure, call):
    """The call is woken, and not tried again; its connection is closed."""
    asked, closed = threading.Event(), threading.Event()

    def hold(connection):
        connection.recv(1 << 16)
        asked.set()
        connection.settimeout(60)
        try:
            while connection.recv(1 << 16):
                pass
        except OSError:
            pass  # of TLS: cut
        closed.set()

    context = request.getfixturevalue("tls") if secure else None
    options = {"verify": False} if secure else {}
    client = connect(listen(hold, context).url, timeout=100, retry=Retry(deadline=100), **options)
    layer = client.layer("bn")
    with ThreadPoolExecutor() as threads:
        running = threads.submit(layer.inspect if call == "inspect" else lambda: layer.train(BATCH))
        assert asked.wait(60)
        client.close()
        with pytest.raises(ConnectionFailed, match="closed during the call") as raised:
            running.result(60)
    assert raised.value.permanent
    assert raised.value.outcome_unknown == (call == "train")
    assert closed.wait(60)


def test_a_client_that_is_closed_by_the_call_leaves_no_connection(connect, listen):
    """A connection that comes back to its pool after the pool was closed."""
    closed = threading.Event()

    def answer(connection):
        connection.recv(1 << 16)
        client.close()
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            connection.settimeout(60)
            while connection.recv(1 << 16):
                pass
        except TimeoutError:
            return
        except OSError:
            pass
        closed.set()

    client = connect(listen(answer).url)
    assert client.ready() is False
    assert closed.wait(60)
