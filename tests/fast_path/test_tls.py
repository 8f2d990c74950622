"""The protocol over TLS, whose transports buffer differently."""

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load, save

from batchnorm_client.wire.media_types import SAFETENSORS
from batchnorm_service.app import create_app
from batchnorm_service.settings import Settings
from batchnorm_service.store.memory import MemoryStore

from .running import answer, listening, post, put, until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate"),
]

ASGI = "Connection: TE\r\n"  # a header that the fast path leaves to ASGI
LARGE = save({"input": np.ones((1 << 20, 2), np.float32)})  # 8 MiB: more than the kernel's buffers take


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def anyio_backend(request):
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate and its key in one file."""
    both = tmp_path_factory.mktemp("tls") / "both.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    subprocess.run(
        ["openssl", "req", *options.split(), "-keyout", both, "-out", f"{both}.crt"], check=True, capture_output=True
    )
    both.write_text(both.read_text() + both.with_suffix(".pem.crt").read_text())
    return both


@contextlib.asynccontextmanager
async def serving(certificate, **settings):
    chosen = Settings(ssl_certfile=certificate, **settings)
    gateway = create_app(chosen, MemoryStore())
    async with gateway.app.router.lifespan_context(gateway.app), listening(gateway, chosen) as (port, state):
        yield port, state
        assert gateway.running == 0
        await until(lambda: gateway.transfers.buffered == 0)


@contextlib.asynccontextmanager
async def connection(port, certificate, **receive_buffer):
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.load_cert_chain(certificate)
    with socket.socket() as sock:
        for size in receive_buffer.values():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 15, ssl=context, server_hostname="test")
        try:
            async with asyncio.timeout(40):
                yield reader, writer
        finally:
            writer.transport.abort()


@pytest.mark.parametrize("authorities", [False, True], ids=["anybody", "certified"])
@pytest.mark.parametrize("way", ["", ASGI], ids=["fast path", "asgi"])
async def test_calls_in_a_row(anyio_backend, certificate, authorities, way):
    """Seen: after an odd number of writes the connection took itself for one whose client does not read, for ever."""
    more = {"ssl_ca_certs": certificate} if authorities else {}
    async with serving(certificate, **more) as (port, _):
        for calls in range(4):
            async with connection(port, certificate) as (reader, writer):
                for number in range(calls):
                    writer.write(put(f"bn{number}", ""))
                    assert (await answer(reader))[0] in {200, 201}
                    writer.write(post(f"/v1/layers/bn{number}/eval", LARGE, SAFETENSORS, way))
                    status, _, body = await answer(reader)
                    assert status == 200
                    assert load(body)["output"].shape == (1 << 20, 2)


@pytest.mark.parametrize("way", ["", ASGI], ids=["fast path", "asgi"])
async def test_who_reads_nothing_is_cut(anyio_backend, certificate, way):
    """Seen: after 105 seconds, whatever the timeout, because TLS hands a whole response to the transport below it."""
    async with (
        serving(certificate, write_timeout_seconds=0.3) as (port, state),
        connection(port, certificate, receive_buffer=4096) as (reader, writer),
    ):
        writer.write(put("bn", ""))
        assert (await answer(reader))[0] == 201
        writer.write(post("/v1/layers/bn/eval", LARGE, SAFETENSORS, way))
        await writer.drain()
        reader._transport.pause_reading()
        await until(lambda: not state.connections)
