"""Every error answer becomes an exception of the tree."""

import json
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from batchnorm_client import PROBLEMS, LayerNotFound, MethodNotAllowed, NotFound, Overloaded, UnexpectedAnswer
from batchnorm_client.core import Response
from batchnorm_client.core.problems import error_of


def answer(status, document=None, *, body=None, media_type="application/problem+json", **headers):
    headers = {"content-type": media_type, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Response(status, headers, json.dumps(document).encode() if body is None else body)


def test_no_problem_of_the_service_is_unmapped(url):
    """Its own list of problems, and what its OpenAPI document says of each call."""
    listed = {line.split()[1] for line in httpx.get(f"{url}/problems").text.splitlines()}
    assert listed == set(PROBLEMS)
    document = httpx.get(f"{url}/openapi.json").text
    named = {part.split("`")[0].split('"')[0] for part in document.split("/problems/")[1:]} - {"{problem}"}
    assert named <= set(PROBLEMS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_becomes_its_exception(name):
    cls = PROBLEMS[name]
    document = {
        "type": f"/problems/{name}",
        "title": cls.title,
        "status": cls.status,
        "detail": "what was wrong",
        "instance": "/v1/layers/bn",
        "field": "eps",
        "expected": [1],
        "request_id": "a member of that name",
        "self": 1,
    }
    error = error_of(answer(cls.status, document, x_request_id="r", retry_after="7"))
    assert type(error) is cls
    assert str(error) == error.detail == "what was wrong"
    assert (error.status, error.request_id, error.retry_after) == (cls.status, "r", 7)
    assert error.fields == {"field": "eps", "expected": [1], "request_id": "a member of that name", "self": 1}


@pytest.mark.parametrize(
    "detail",
    [
        "the body is larger than 8 bytes",
        "the body is larger than the 8 bytes that BATCHNORM_MAX_BODY_BYTES allows",
        "larger than BATCHNORM_MAX_BODY_BYTES; train_local sends moments instead",
    ],
)
def test_a_body_that_is_too_large(detail):
    """What a user sees names the setting and the way around it, once, also where the service's text does not."""
    error = error_of(answer(413, {"type": "/problems/payload-too-large", "detail": detail}))
    seen = "".join(traceback.format_exception(error))
    assert (seen.count("BATCHNORM_MAX_BODY_BYTES"), seen.count("train_local")) == (1, 1)
    assert error.detail == detail


def test_a_body_that_is_too_large_for_something_in_between():
    error = error_of(answer(413, body=b"<h1>413</h1>", media_type="text/html"))
    assert isinstance(error, UnexpectedAnswer)
    assert "train_local" in str(error)


def test_the_services_own_problems(client, url, name):
    with pytest.raises(LayerNotFound) as raised:
        client.layer(name).inspect()
    assert raised.value.request_id
    found = httpx.get(f"{url}/nowhere")
    assert type(error_of(Response(found.status_code, found.headers, found.content))) is NotFound
    found = httpx.delete(f"{url}/v1/layers")
    error = error_of(Response(found.status_code, found.headers, found.content))
    assert isinstance(error, MethodNotAllowed)
    assert error.fields["got"] == "DELETE"


@pytest.mark.parametrize(
    ("given", "detail", "name"),
    [
        (answer(502, body=b"<h1>Bad Gateway</h1>", media_type="text/html"), "status 502 .text/html.", None),
        (answer(418, body=b"", media_type=""), "status 418 .no Content-Type.", None),
        (answer(400, body=b"not json"), "status 400", None),
        (answer(400, ["a", "list"]), "status 400", None),
        (answer(400, {"type": 5}), "status 400", None),
        (answer(429, {"type": "/problems/too-hot", "detail": "later"}), "status 429: later", "too-hot"),
        (answer(403, {"type": "about:blank", "title": "No"}), "status 403: No", "about:blank"),
        (answer(500, {"type": "x", "detail": 5, "title": None}, media_type="application/json"), "status 500", "x"),
    ],
)
def test_what_is_not_in_the_contract(given, detail, name):
    error = error_of(given)
    assert isinstance(error, UnexpectedAnswer)
    assert (error.status, error.name) == (given.status, name)
    with pytest.raises(UnexpectedAnswer, match=detail):
        raise error


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("0", 0, 0),
        (" 12 ", 12, 12),
        pytest.param(
            format_datetime(datetime.now(UTC) + timedelta(days=10), usegmt=True),
            9 * 86400,
            10 * 86400,
            id="in ten days",
        ),
        ("Sun Nov  6 08:49:37 2994", 1e9, 1e11),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0, 0),
    ],
)
def test_retry_after(value, low, high):
    error = error_of(answer(503, {"type": "/problems/overloaded"}, retry_after=value), time.time())
    assert isinstance(error, Overloaded)
    assert error.detail == Overloaded.title
    assert low <= error.retry_after <= high


@pytest.mark.parametrize("value", ["", "soon", "-1", "1.5", "9" * 400, "Sun, 99 Nov 1994 08:49:37 GMT", "\x00"])
def test_retry_after_that_says_nothing(value):
    assert error_of(answer(503, {"type": "/problems/overloaded"}, retry_after=value), time.time()).retry_after is None


@pytest.mark.parametrize(
    "response",
    [
        {"status_code": 200, "html": "<h1>Log in to this wireless network</h1>"},
        {"status_code": 200, "json": {"name": "bn"}},
        {"status_code": 200, "content": b"[", "headers": {"content-type": "application/json"}},
        {"status_code": 204},
        {"status_code": 302, "headers": {"location": "/"}},
    ],
)
def test_a_wrong_answer_to_a_document_call(connect, response):
    with pytest.raises(UnexpectedAnswer) as raised:
        connect.over(lambda _: httpx.Response(**response)).layer("bn").inspect()
    assert raised.value.status == response["status_code"]


def test_a_newer_service_may_say_more(connect, layer):
    document = json.loads(layer.inspect().model_dump_json()) | {"mood": "fine"}
    document["config"]["new_option"] = 1
    assert connect.over(lambda _: httpx.Response(200, json=document)).layer(layer.name).inspect() == layer.inspect()
