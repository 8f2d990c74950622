"""Content-Type and Accept."""

import pytest

from batchnorm_client.wire.errors import NotAcceptable, UnsupportedMediaType
from batchnorm_client.wire.media_types import JSON, NPY, SAFETENSORS
from batchnorm_service.rest.negotiation import accepted, content_type

OFFERED = (NPY, JSON, SAFETENSORS)  # the first is the default


@pytest.mark.parametrize(
    ("accept", "forms"),
    [
        (None, [NPY]),
        ("*/*", [NPY]),
        ("application/*", [NPY]),
        ("*/*;q=0.1", [NPY]),
        (JSON, [JSON]),
        ("APPLICATION/JSON ; charset=utf-8", [JSON]),
        (f"{JSON};q=0.5, {SAFETENSORS}", [SAFETENSORS, JSON]),
        (f"{JSON}, {SAFETENSORS}", [JSON, SAFETENSORS]),
        (f"{JSON}, text/plain, */*", [JSON, NPY]),
        (f"{JSON};q=0.5, */*", [NPY, JSON]),
        (f"{NPY};q=0, */*", [JSON]),
        (f"{NPY};q=0, {JSON};q=0, {SAFETENSORS};q=0.001", [SAFETENSORS]),
        ("", [NPY]),
        ("json", [NPY]),
        (f"{',' * 99}{JSON}", [JSON]),
        (f"{',' * 100}{JSON}", [NPY]),  # further elements are not looked at
        (f"json, {SAFETENSORS}", [SAFETENSORS]),
        (f"{JSON};q=high, {SAFETENSORS};q=0.1", [SAFETENSORS]),
    ],
)
def test_accept(accept, forms):
    header = None if accept is None else accept.encode()
    assert list(accepted(header, OFFERED)) == forms


@pytest.mark.parametrize("accept", [b"text/html", b"application/json;q=0", b"*/*;q=0", b"image/png, application/xml"])
def test_nothing_acceptable(accept):
    with pytest.raises(NotAcceptable) as caught:
        accepted(accept, OFFERED)
    assert caught.value.fields["expected"] == list(OFFERED)


@pytest.mark.parametrize(
    "header",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8";x=1'],
)
def test_content_type(header):
    assert content_type({b"content-type": header.encode()}, (JSON,)) == JSON


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"content-type": b""},
        {b"content-type": b"text/json"},
        {b"content-type": b"application/json, application/json"},
        {b"content-type": b"application/json; charset=utf-16"},
        {b"content-type": b"application/json", b"content-encoding": b"gzip"},
    ],
)
def test_content_type_that_is_not_read(headers):
    with pytest.raises(UnsupportedMediaType) as caught:
        content_type(headers, (JSON,))
    assert caught.value.fields["expected"]
