"""Requests that lie or try to get at something: each is refused with 4xx, in bounded memory, and nothing changes."""

import io
import json
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save

from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS
from fast_path.running import get, post, serving

pytestmark = pytest.mark.anyio

WAYS = {"fast path": "", "asgi": "Connection: TE\r\n"}
CALLS = ("train", "eval", "inverse", "backward", "moments")
DEEP = 100_000
HUGE = "9" * 100_000


@pytest.fixture
def anyio_backend():
    return "asyncio", {"use_uvloop": True}


def with_body(method, path, body, media=JSON, headers=""):
    return post(path, body, media, headers).replace(b"POST", method.encode(), 1)


async def state_of(service):
    ((_, _, body),) = await service.ask(get("/v1/layers/bn"))
    return json.loads(body)


async def check_refused(service, request, statuses=range(400, 500)):
    """It gets one of these statuses, as a problem; returns headers and document."""
    before = await state_of(service)
    ((status, headers, body),) = await service.ask(request)
    document = json.loads(body)
    assert status in statuses, document
    assert document["type"].startswith("/problems/")
    assert await state_of(service) == before
    return headers, document


NAMES = [
    "..",
    "../bn",
    "..%2f..%2fetc%2fpasswd",
    "bn%00",
    "bn%0d%0aSet-Cookie:%20a=b",
    "%2e%2e",
    "bn%2ftrain",
    "-bn",
    "b n",
]
NAMES += ["bn;x", "bn%5c..", "%c0%ae%c0%ae", "%ef%bc%8e", "b%C3%A9", ".bn", "~bn", "bn%7f", "a" * 201]


@pytest.mark.parametrize("name", NAMES)
async def test_path_tricks_in_names(anyio_backend, monkeypatch, name):
    quoted = name.replace(" ", "%20")
    async with serving(monkeypatch) as service:
        for method, call, body in (("PUT", "", b'{"num_features": 2}'), ("POST", "/eval", b'{"input": [[1, 2]]}')):
            request = with_body(method, f"/v1/layers/{quoted}{call}", body)
            headers, _ = await check_refused(service, request, (404, 405, 422))
            assert "set-cookie" not in headers
        ((_, _, body),) = await service.ask(get("/v1/layers"))
        assert [layer["name"] for layer in json.loads(body)["layers"]] == ["bm", "bn"]


@pytest.mark.parametrize("tag", ["..", "a%2f..%2fb", "a%0d%0ax:%20y", "a%00", "7" * 300, "a" * 201, "%C3%A9", "a b"])
async def test_tricks_in_tags(anyio_backend, monkeypatch, tag):
    quoted = tag.replace(" ", "%20")
    async with serving(monkeypatch) as service:
        await check_refused(service, with_body("PUT", f"/v1/layers/bn/pins/{quoted}", b"{}"), (404, 405, 422))
        for way in ("eval", "inverse"):
            await check_refused(service, post(f"/v1/layers/bn/{way}?at={quoted}", b'{"input": [[1, 2]]}'), (404, 422))
        ((_, _, body),) = await service.ask(get("/v1/layers/bn/pins"))
        assert json.loads(body) == {"pins": []}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("value", ["a\tb", "a b", "\xe9", "x" * 201, "a, b", ""])
async def test_request_ids_that_would_break_a_header(anyio_backend, monkeypatch, value, way):
    """They are replaced by a new one: an answer never repeats what is no key."""
    request = post("/v1/layers/bn/eval", b'{"input": [[1, 2]]}', JSON, way)
    request = request.replace(b"\r\n", b"\r\nX-Request-ID: " + value.encode("latin-1") + b"\r\n", 1)
    async with serving(monkeypatch) as service:
        ((status, headers, _),) = await service.ask(request)
        assert status == 200
        assert headers["x-request-id"].isalnum()
        assert len(headers["x-request-id"]) == 32


async def test_a_header_that_ends_in_another(anyio_backend, monkeypatch):
    """A bare CR or NUL in a value is no end of a line."""
    async with serving(monkeypatch) as service:
        for character in (b"\r", b"\0"):
            request = get("/v1/layers/bn").replace(
                b"Host: x", b"Host: x\r\nX-Request-ID: a" + character + b"Set-Cookie: b"
            )
            ((status, headers, _),) = await service.ask(request)
            assert status == 400
            assert "set-cookie" not in headers


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_keys_that_are_no_keys(anyio_backend, monkeypatch, way):
    async with serving(monkeypatch) as service:
        for key in ("a b", "\xe9", "x" * 201, "a\tb"):
            request = post("/v1/layers/bn/train", b'{"input": [[1, 2], [3, 5]]}', JSON, way)
            request = request.replace(b"\r\n", b"\r\nIdempotency-Key: " + key.encode("latin-1") + b"\r\n", 1)
            await check_refused(service, request, (422,))


DOCUMENTS = {
    "num_features": ("PUT", "/v1/layers/new", '{"num_features": %s}'),
    "momentum": ("PATCH", "/v1/layers/bn", '{"momentum": %s}'),
    "eps": ("PATCH", "/v1/layers/bn", '{"eps": %s}'),
    "weight": ("PATCH", "/v1/layers/bn", '{"weight": [%s, 1]}'),
    "count": ("POST", "/v1/layers/bn/moments", '{"count": %s, "mean": [1, 2], "var": [1, 2]}'),
    "many counts": ("POST", "/v1/moments", '{"layers": %s}'),
    "rollback": ("POST", "/v1/layers/bn/rollback", '{"version": %s}'),
    "pin": ("PUT", "/v1/layers/bn/pins/a", '{"version": %s}'),
    "reset": ("POST", "/v1/layers/bn/reset", '{"what": %s}'),
    "input": ("POST", "/v1/layers/bn/train", '{"input": [[%s, 1], [1, 2]]}'),
}
VALUES = {"huge": HUGE, "negative": f"-{HUGE}", "65 bits": str(1 << 64), "exponent": "1e999999999", "deep": "[" * DEEP}
VALUES |= {"deep objects": '{"a":' * DEEP, "deep and closed": "[" * DEEP + "]" * DEEP}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize(("method", "path", "text"), DOCUMENTS.values(), ids=DOCUMENTS)
async def test_huge_numbers_and_deep_json(anyio_backend, monkeypatch, method, path, text, value):
    async with serving(monkeypatch) as service:
        body = (text % value).encode()
        accepted = value == str(1 << 64) and path in ("/v1/layers/bn/train", "/v1/layers/bn")  # it is a number
        if accepted and "input" in text:
            ((status, *_),) = await service.ask(post(path, body))
            assert status == 200
        elif not (accepted and ("weight" in text or "eps" in text)):
            await check_refused(service, with_body(method, path, body), (400, 404, 413, 422))


def npy(shape, data=b""):
    text = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def tensors(shape, data=b"", end=None):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data) if end is None else end]}
    text = json.dumps({"input": entry}).encode()
    return len(text).to_bytes(8, "little") + text + data


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("input.npy", bytes(50 << 20))
    return file.getvalue()


class Shout:
    """A pickle that would run a command."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def pickled():
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickle.dumps(Shout())


BOMBS = {
    "npy of a billion": (NPY, npy((500_000_000, 2))),
    "npy of 2**62": (NPY, npy((1 << 61, 2))),
    "npy of a huge dimension": (NPY, npy((10**300, 2))),
    "npy of nothing, a billion times": (NPY, npy((0, 2, 1 << 30))),
    "npy of 65 dimensions": (NPY, npy((1,) * 65, bytes(4))),
    "npy with a deep header": (NPY, b"\x93NUMPY\x01\x00\xa0\x0f" + b"(" * 4000),
    "npy with a long header": (NPY, b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"),
    "safetensors of a billion": (SAFETENSORS, tensors([500_000_000, 2], bytes(8))),
    "safetensors of a billion, and offsets": (SAFETENSORS, tensors([500_000_000, 2], bytes(8), 4_000_000_000)),
    "safetensors of a huge dimension": (SAFETENSORS, tensors([10**300, 2])),
    "safetensors of nothing, a billion times": (SAFETENSORS, tensors([0, 2, 1 << 30])),
    "safetensors of 65 dimensions": (SAFETENSORS, tensors([1] * 65, bytes(4))),
    "safetensors with a long header": (SAFETENSORS, b"\xff" * 8 + b"{}"),
    "safetensors with a deep header": (SAFETENSORS, (200_000).to_bytes(8, "little") + b'{"a":' * 40_000),
    "a zip as npy": (NPY, zipped()),
    "a zip as safetensors": (SAFETENSORS, zipped()),
    "a pickle in npy": (NPY, pickled()),
    "a pickle alone": (NPY, pickle.dumps(Shout())),
    "json of 65 dimensions": (JSON, b'{"input": ' + b"[" * 65 + b"1" + b"]" * 65 + b"}"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("media", "body"), BOMBS.values(), ids=BOMBS)
async def test_bombs(anyio_backend, monkeypatch, media, body, way):
    """What a header declares is checked against the bytes that are there, before anything is allocated for it."""
    async with serving(monkeypatch) as service:
        await check_refused(service, post("/v1/layers/bn/eval", save({"input": np.ones((1, 2))}), SAFETENSORS))
        tracemalloc.start()
        try:
            for call in ("train", "eval", "inverse"):
                await check_refused(service, post(f"/v1/layers/bn/{call}", body, media, way), (400, 413, 422))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < (4 << 20) + 16 * len(body)


async def test_a_length_that_is_announced_and_does_not_come(anyio_backend, monkeypatch):
    async with serving(monkeypatch) as service:
        for length in ("99999999999999999999", "1" * 1000, "-1", "1,1", "0x10"):
            request = post("/v1/layers/bn/eval", b"").replace(
                b"Content-Length: 0", f"Content-Length: {length}".encode()
            )
            await check_refused(service, request, (400, 413))
