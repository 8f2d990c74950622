"""Bodies as ASGI delivers them: in chunks, with or without their length."""

import types

import numpy as np
import pytest

from batchnorm_client.wire.errors import MalformedBody, Overloaded, PayloadTooLarge
from batchnorm_service.rest import bodies as body_module
from batchnorm_service.rest.bodies import BodyBuffer, ClientGoneError, read_body

pytestmark = pytest.mark.anyio

LIMIT = 100


def receiver(*chunks, end=True):
    """ASGI's receive for a body in these chunks; without `end` the client goes away after them."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if end:
        messages[-1]["more_body"] = False
    else:
        messages.append({"type": "http.disconnect"})
    queue = iter(messages)

    async def receive():
        return next(queue)

    return receive


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("chunks", [[b""], [b"abc"], [b"ab", b"c"], [b"", b"a", b"", b"bc", b""], [b"x" * LIMIT]])
async def test_a_body_is_read_whole(chunks, announced):
    whole = b"".join(chunks)
    headers = {b"content-length": str(len(whole)).encode()} if announced else {}
    body = await read_body(headers, receiver(*chunks), LIMIT)
    assert bytes(body) == whole
    assert not memoryview(body).readonly


async def test_too_large_is_refused_before_it_is_read():
    async def receive():
        raise AssertionError("read")

    for announced in (str(LIMIT + 1), "9" * 1000):
        with pytest.raises(PayloadTooLarge) as caught:
            await read_body({b"content-length": announced.encode()}, receive, LIMIT)
    assert caught.value.fields["expected"] == LIMIT


async def test_too_large_is_refused_while_it_is_read():
    with pytest.raises(PayloadTooLarge):
        await read_body({}, receiver(b"x" * 60, b"x" * 60, b"x" * 60), LIMIT)


@pytest.mark.parametrize("chunks", [[b"ab"], [b"abcd"], [b"a", b"b"], [b"ab", b"cd"], [b"", b""]])
async def test_another_length_than_announced_is_refused(chunks):
    with pytest.raises(MalformedBody):
        await read_body({b"content-length": b"3"}, receiver(*chunks), LIMIT)


async def test_a_length_that_is_no_number_is_refused():
    with pytest.raises(MalformedBody):
        await read_body({b"content-length": b"-1"}, receiver(b""), LIMIT)


@pytest.mark.parametrize("headers", [{b"content-length": b"50"}, {}])
async def test_a_client_that_goes_away(headers):
    with pytest.raises(ClientGoneError):
        await read_body(headers, receiver(b"x" * 20, end=False), LIMIT)


class Allocations(list):
    """What `BodyBuffer` allocates."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(body_module, "np", types.SimpleNamespace(empty=self.empty, uint8=np.uint8))

    def empty(self, size, dtype):
        self.append(size)
        return np.empty(size, dtype)


@pytest.mark.parametrize("piece", [1, 3, 1000, 1 << 18, 3 << 20])
def test_a_buffer_gives_what_came(piece):
    body = np.random.default_rng(piece).bytes(min(5 << 20, piece * 5000) + 1)
    buffer = BodyBuffer(len(body))
    for begin in range(0, len(body), piece):
        buffer.add(body[begin : begin + piece])
        assert buffer.filled == min(len(body), begin + piece)
    taken = buffer.take()
    assert bytes(taken) == body
    assert not taken.readonly


def test_a_body_that_has_not_come_takes_no_memory(monkeypatch):
    allocations, gib = Allocations(monkeypatch), 1 << 30
    buffer = BodyBuffer(gib)
    assert allocations == []
    for _ in range(16):
        buffer.add(bytes(1000))
    assert bytes(buffer.take()) == bytes(16_000)
    assert sum(allocations) < 64 * 16_000
    allocations.clear()
    buffer = BodyBuffer(gib)
    for come in range(1, 10_000):
        buffer.add(b"x")  # in pieces so small that a list of them would be larger than they are
        assert sum(allocations) <= 128 * come


def test_without_memory_for_a_body_it_is_refused(monkeypatch):
    def empty(*_):
        raise MemoryError

    monkeypatch.setattr(body_module, "np", types.SimpleNamespace(empty=empty, uint8=np.uint8))
    buffer = BodyBuffer(8 << 20)
    with pytest.raises(Overloaded):
        buffer.add(bytes(2 << 20))
