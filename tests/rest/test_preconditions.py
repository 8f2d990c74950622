"""If-Match and If-None-Match."""

import pytest

from batchnorm_client.wire.errors import InvalidRequest
from batchnorm_service.rest.preconditions import if_match, matches_none


@pytest.mark.parametrize(
    ("header", "versions"),
    [
        (b"*", None),
        (b'"7"', {7}),
        (b'"7", "8"', {7, 8}),
        (b' ,"7",, "8" ,', {7, 8}),
        (b'W/"7"', set()),
        (b'W/"7", "8"', {8}),
        (b'"007"', set()),
        (b'"anything,with,commas", "9"', {9}),
        (b'"99999999999999999999999999"', set()),
        (b'""', set()),
    ],
)
def test_if_match(header, versions):
    assert if_match(header.decode()) == versions


@pytest.mark.parametrize("header", [b"", b"7", b'"7', b'"7" "8"', b'*, "7"', b'w/"7"', b'"\x01"'])
def test_if_match_that_is_no_list_is_refused(header):
    with pytest.raises(InvalidRequest) as caught:
        if_match(header.decode())
    assert caught.value.fields["field"] == "If-Match"


@pytest.mark.parametrize(
    ("header", "lets_through"),
    [(b'"7"', False), (b'W/"7"', False), (b'"8", "7"', False), (b"*", False), (b'"8"', True), (b"7", True)],
)
def test_if_none_match(header, lets_through):
    assert matches_none(header, 7) is lets_through


@pytest.mark.anyio
async def test_an_unchanged_layer_is_304(client, layer):
    tag = (await client.get(layer)).headers["etag"]
    answer = await client.get(layer, headers={"If-None-Match": f"W/{tag}"})
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert answer.headers["x-request-id"]
    assert (await client.get(layer, headers={"If-None-Match": '"0"'})).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "call", "arguments"),
    [
        ("PATCH", "", {"json": {"eps": 0.5}}),
        ("POST", "/reset", {}),
        ("PUT", "/state", {"json": {"weight": [5, 5]}}),
        ("DELETE", "", {}),
    ],
)
async def test_a_stale_if_match_changes_nothing(client, layer, method, call, arguments):
    before = (await client.get(layer)).json()
    for stale in ('"0"', f'W/"{before["version"]}"'):
        answer = await client.request(method, layer + call, headers={"If-Match": stale}, **arguments)
        assert (answer.status_code, answer.json()["type"]) == (412, "/problems/version-mismatch")
    assert (await client.get(layer)).json() == before
    fresh = f'"1234", "{before["version"]}"'
    assert (await client.request(method, layer + call, headers={"If-Match": fresh}, **arguments)).is_success


@pytest.mark.anyio
async def test_two_if_match_lines_are_one_list(client, layer):
    version = (await client.get(layer)).json()["version"]
    headers = [("If-Match", '"0"'), ("If-Match", f'"{version}"')]
    assert (await client.patch(layer, json={"eps": 0.5}, headers=headers)).status_code == 200
