"""Bodies as ASGI delivers them: in chunks, with or without their length."""

import pytest

from batchnorm_client.errors import MalformedBody, PayloadTooLarge
from batchnorm_service.api.bodies import ClientGoneError, read_body

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
