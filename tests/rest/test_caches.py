"""Caches whose keys callers choose are bounded in bytes, not only in entries."""

import pytest

from batchnorm_client.wire.media_types import JSON
from batchnorm_service.rest import negotiation
from batchnorm_service.rest.negotiation import accepted, content_type
from batchnorm_service.rest.target import read_target, target_of

LONG = b"x" * 60_000


def test_long_paths_are_not_kept():
    """1,100 refused requests took 583 MB."""
    before = target_of.cache_info().currsize
    for number in range(20):
        path = b"/v1/layers/%d%s/train" % (number, LONG)
        target = read_target({"raw_path": path, "path": ""})
        assert (target.layer.encode(), target.call) == (path.split(b"/")[3], "/v1/layers/{name}/train")
    assert target_of.cache_info().currsize == before
    assert target_of(b"/v1/layers/%s/train" % (b"x" * 200)).layer == "x" * 200
    read_target({"raw_path": b"/v1/layers/%s/backward" % (b"y" * 200), "path": ""})
    assert target_of.cache_info().currsize == before + 2


@pytest.mark.parametrize(
    ("cache", "call"),
    [
        (negotiation._accepted, lambda number: accepted(b"%d, application/json, " % number + LONG, (JSON,))),
        (
            negotiation._content_type,
            lambda number: content_type({b"content-type": b"application/json; x=%d" % number + LONG}, (JSON,)),
        ),
    ],
)
def test_long_headers_are_not_kept(cache, call):
    before = cache.cache_info().currsize
    for number in range(20):
        assert JSON in call(number)
    assert cache.cache_info().currsize == before
