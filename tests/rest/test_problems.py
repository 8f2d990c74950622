"""Problems, their pages, and what every answer carries."""

import logging
import re

import pytest

from batchnorm_client.wire.errors import PROBLEMS, StoreUnavailable
from batchnorm_service.store.base import StoreError

pytestmark = pytest.mark.anyio

PATHS = [
    "/healthz",
    "/nowhere",
    "/v1/layers/",
    "/v1/layers/.bad",
    "/v1/layers/none",
    "/v1/layers/none/train",
    "/v1/layers",
]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "TRACE"])
async def test_every_answer_has_a_request_id(client, method):
    for path in PATHS:
        answer = await client.request(method, path, headers={"X-Request-ID": "!mine~"})
        assert answer.headers.get_list("x-request-id") == ["!mine~"], path
        for bad in ("", "a b", "x" * 201, "\u00e9".encode("latin-1")):
            answer = await client.request(method, path, headers={"X-Request-ID": bad})
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"]), path


async def test_every_problem_has_a_page(client):
    for name, problem in PROBLEMS.items():
        answer = await client.get(f"/problems/{name}")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8", name
        assert problem.title in answer.text
        assert str(problem.status) in answer.text
        assert problem.__doc__.splitlines()[0] in answer.text
        assert name in (await client.get("/problems")).text


async def test_no_such_problem(client):
    answer = await client.get("/problems/none")
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/layers/", "/v3/layers", "/v1/layers/bn/nothing", "/v1/layers//train", "/healthz/", "//"]
)
async def test_unknown_paths_are_404_and_never_redirected(client, path):
    answer = await client.get(f"http://test{path}")
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")
    assert answer.json()["instance"] == path


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/v1/layers/bn", "DELETE, GET, HEAD, PATCH, PUT"),
        ("OPTIONS", "/v1/layers/bn", "DELETE, GET, HEAD, PATCH, PUT"),
        ("DELETE", "/v1/layers", "GET, HEAD"),
        ("GET", "/v1/layers/bn/train", "POST"),
        ("HEAD", "/v1/layers/bn/eval", "POST"),
        ("POST", "/v1/layers/bn/state", "GET, HEAD, PUT"),
        ("GET", "/v1/moments", "POST"),
        ("PUT", "/docs", "GET, HEAD"),
    ],
)
async def test_405_lists_every_method(client, method, path, allow):
    answer = await client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    if method != "HEAD":
        assert answer.json()["type"] == "/problems/method-not-allowed"


@pytest.mark.parametrize("call", ["", "/train", "/state"])
async def test_an_unexpected_error_is_logged_and_not_shown(service, caplog, monkeypatch, call):
    async def fail(*_args, **_kwargs):
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr(service.layers, "get", fail)
    monkeypatch.setattr(service.layers.states, "unless", fail)
    monkeypatch.setattr(service.layers.batches, "train", fail)
    with caplog.at_level(logging.ERROR):
        async with service.client() as client:
            method = "POST" if call == "/train" else "GET"
            headers = {"X-Request-ID": "find-me"}
            answer = await client.request(method, f"/v1/layers/bn{call}", json={"input": []}, headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/internal-error")
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "find-me"
    assert "secret" not in answer.text
    (record,) = [record for record in caplog.records if record.exc_info]  # and a line for the request
    assert record.levelno == logging.ERROR
    assert "find-me" in record.getMessage()
    assert "the secret of the house" in str(record.exc_info[1])


async def test_a_store_that_does_not_answer(service, client, monkeypatch):
    async def fail(*_args, **_kwargs):
        raise StoreError("disk on fire")

    for name in ("ping", "create"):
        monkeypatch.setattr(service.store, name, fail)
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    for answer in (await client.get("/readyz"), await client.put("/v1/layers/bn", json={"num_features": 1})):
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/store-unavailable")
        assert int(answer.headers["retry-after"]) >= 1


async def test_ready(client):
    assert (await client.get("/readyz")).json() == {"status": "ok"}


async def test_retry_after_is_whole_seconds(service, client, monkeypatch):
    async def fail():
        raise StoreUnavailable("later", retry_after=2.5)

    monkeypatch.setattr(service.layers, "ping", fail)
    assert (await client.get("/readyz")).headers["retry-after"] == "3"
