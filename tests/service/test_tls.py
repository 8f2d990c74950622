"""HTTPS, with certificates of an authority of our own, for the service and for its callers."""

import asyncio
import shutil
import subprocess

import httpx
import numpy as np
import pytest

from batchnorm_client import AsyncClient, Client, ConnectionFailed

from .conftest import COMMAND
from .test_command import run

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")

BATCH = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """A folder with ca, server, client and stranger: .pem and .key; the stranger is signed by nobody."""
    folder = tmp_path_factory.mktemp("pki")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2")
    for name in ("ca", "stranger"):
        openssl(*new, "-nodes", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    for name, extension in (("server", "subjectAltName=IP:127.0.0.1"), ("client", "extendedKeyUsage=clientAuth")):
        signed = ("-nodes", "-subj", f"/CN={name}", "-addext", extension, "-CA", "ca.pem", "-CAkey", "ca.key")
        openssl(*new, *signed, "-addext", "basicConstraints=CA:FALSE", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl("ec", "-aes256", "-passout", "pass:s3cret", "-in", "server.key", "-out", "locked.key")
    return folder


def variables(pki, **others):
    return {
        "BATCHNORM_SSL_CERTFILE": str(pki / "server.pem"),
        "BATCHNORM_SSL_KEYFILE": str(pki / "server.key"),
    } | others


@pytest.mark.parametrize("fast_path", ["1", "0"])
def test_calls_over_tls(start, store, pki, fast_path):
    service = start("--store", store, **variables(pki, BATCHNORM_FAST_PATH=fast_path))
    assert service.url.startswith("https://127.0.0.1:")
    large = np.random.default_rng(0).normal(size=(100_000, 3)).astype(np.float32)  # more than one record, and no join
    with Client(service.url, verify=pki / "ca.pem") as client:
        layer = client.create_layer("bn", 3)
        assert layer.train(BATCH).num_batches_tracked == 1
        assert layer.train(large).output.shape == large.shape

    async def evaluated():
        async with AsyncClient(service.url, verify=str(pki / "ca.pem")) as client:
            return await client.layer("bn").eval(BATCH)

    assert asyncio.run(evaluated()).version == 3
    for verify in (True, pki / "stranger.pem"):
        with Client(service.url, verify=verify) as client, pytest.raises(ConnectionFailed, match="certificate"):
            client.layer("bn").inspect()
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(service.url.replace("https", "http"))
    assert service.stop() == 0
    assert "Traceback" not in service.output


@pytest.mark.parametrize("workers", ["1", "2"])
def test_callers_need_a_certificate(start, store, pki, workers):
    files = variables(pki, BATCHNORM_SSL_CA_CERTS=str(pki / "ca.pem"))
    service = start("--store", store, "--workers", workers, **files)
    with Client(service.url, verify=pki / "ca.pem", cert=(pki / "client.pem", pki / "client.key")) as client:
        assert client.create_layer("bn", 3).train(BATCH).version == 2
    for cert in ({}, {"cert": (pki / "stranger.pem", pki / "stranger.key")}):
        with Client(service.url, verify=pki / "ca.pem", **cert) as client:
            assert not client.ready()
    done = run(
        f"{COMMAND[0].rpartition('/')[0]}/batchnorm",
        *("layers", "--url", service.url, "--cacert", str(pki / "ca.pem")),
        *("--cert", str(pki / "client.pem"), "--key", str(pki / "client.key")),
    )
    assert service.stop() == 0  # also its workers, which would outlive a test that fails
    assert "bn" in done.stdout, done.stderr


def test_a_key_with_a_password(start, pki):
    files = variables(pki, BATCHNORM_SSL_KEYFILE=str(pki / "locked.key"))
    service = start("--store", "memory:", **files, BATCHNORM_SSL_KEYFILE_PASSWORD="s3cret")
    with Client(service.url, verify=pki / "ca.pem") as client:
        assert client.ready()
    assert "s3cret" not in service.output
    for password in ({}, {"BATCHNORM_SSL_KEYFILE_PASSWORD": "wrong"}):
        done = run(*COMMAND, "--store", "memory:", **files, **password)
        assert (done.returncode, done.stdout) == (2, "")
        assert "locked.key" in done.stderr
        assert "wrong" not in done.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_key_that_does_not_fit(store, pki, workers):
    files = variables(pki, BATCHNORM_SSL_KEYFILE=str(pki / "client.key"))
    done = run(*COMMAND, "--store", store, "--workers", workers, **files)
    assert (done.returncode, done.stdout) == (2, "")
    assert "client.key" in done.stderr
    assert len(done.stderr.splitlines()) == 1
