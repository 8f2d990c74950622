"""Writes of a connection that was closed meanwhile."""

import asyncio

import pytest

from batchnorm_service.fast_path.write_coalescing import WriteCoalescer

LARGE = b"x" * (1 << 17)


class Transport:
    """Closed, and refuses to be written to, as uvloop's does."""

    def get_extra_info(self, _name):
        return None

    def is_closing(self):
        return True

    def write(self, data):
        raise RuntimeError("unable to perform operation on a closed transport")

    writelines = write


@pytest.mark.anyio
@pytest.mark.parametrize("send", [lambda outbox: outbox.write(LARGE), lambda outbox: outbox.writelines([LARGE, LARGE])])
async def test_a_large_response_to_a_closed_connection_is_dropped(anyio_backend, send):
    """A response that was read too slowly raised RuntimeError into the log."""
    outbox = WriteCoalescer(Transport(), asyncio.get_running_loop())
    outbox.write(b"small")
    send(outbox)
    await asyncio.sleep(0)
