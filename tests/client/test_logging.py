"""What a program sees that turns logging on for everything."""

import logging

import numpy as np
import pytest

from batchnorm_client import ConnectionFailed, Retry


def test_no_line_for_each_call(connect, url, name, caplog):
    """httpx's clients log each request at INFO."""
    caplog.set_level(logging.INFO)
    client = connect(url)
    client.create_layer(name, 3).train(np.eye(3, dtype=np.float32))
    assert client.ready()
    assert not [record for record in caplog.records if record.name.startswith(("httpx", "httpcore", "batchnorm"))]


def test_a_service_that_is_not_there(connect, caplog):
    client = connect("http://127.0.0.1:1", retry=Retry(attempts=4, wait_initial=0))
    assert client.ready() is False  # asks once
    assert not caplog.records
    with pytest.raises(ConnectionFailed):
        client.layer("bn").inspect()
    assert ["cannot reach http://127.0.0.1:1" in message for message in caplog.messages] == [True] * 3
