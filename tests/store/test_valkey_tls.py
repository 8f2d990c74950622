"""Encrypted connections: through a proxy that ends them, because the wheel's server was built without TLS."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from batchnorm_service.store.base import Committed, StoreRefusedError
from batchnorm_service.store.valkey.store import ValkeyStore
from store.harness import created, loaded, receipt
from store.valkey_servers import Server

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is needed to make a certificate"),
]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1, signed by itself, and its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    name = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", path.with_name("certificate.pem")]
    subprocess.run(["openssl", "req", *options.split(), *name], check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_name("certificate.pem").read_text())
    return path


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def proxy(server: Server, certificate: Path) -> AsyncIterator[int]:
    """The port of a proxy that speaks TLS to its clients."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        theirs, ours = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(_copy(reader, ours), _copy(theirs, writer))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_encrypted_connection(valkey_server: Server, certificate: Path) -> None:
    async with proxy(valkey_server, certificate) as port:
        store = ValkeyStore(f"valkeys://127.0.0.1:{port}/0?prefix=tls&ca={certificate}")
        await store.open()
        record = await created(store, "a", bytes(1 << 20))
        assert await store.commit("a", record.stamp, None, [receipt()]) == Committed()
        assert await loaded(store, "a") == record
        await store.close()


async def test_a_certificate_that_nobody_vouches_for_is_refused(valkey_server: Server, certificate: Path) -> None:
    async with proxy(valkey_server, certificate) as port:
        with pytest.raises(StoreRefusedError, match="certificate cannot be trusted: self-signed"):
            await ValkeyStore(f"valkeys://127.0.0.1:{port}").open()


async def test_a_certificate_of_another_name_is_refused(valkey_server: Server, certificate: Path) -> None:
    async with proxy(valkey_server, certificate) as port:
        with pytest.raises(StoreRefusedError, match="certificate cannot be trusted: Hostname mismatch"):
            await ValkeyStore(f"valkeys://localhost:{port}?ca={certificate}").open()


async def test_a_file_of_certificates_that_is_not_there_is_refused(valkey_server: Server, tmp_path: Path) -> None:
    with pytest.raises(StoreRefusedError, match="no such file"):
        await ValkeyStore(f"valkeys://127.0.0.1:{valkey_server.port}?ca={tmp_path}/none.pem").open()
