"""The fast path serves inference, with the same answers as ASGI."""

import json

import pytest
import torch

from fast_path.running import get, post, serving
from fast_path.test_against_asgi import ORDINARY, anyio_backend, comparable, service

from .conftest import LENGTH, batch, body_of

__all__ = ["anyio_backend", "service"]

pytestmark = pytest.mark.anyio


def case(tensor, datatype="FP32", *, binary, headers="", **members):
    body, own = body_of(tensor, datatype, binary=binary, **members)
    return body, headers + "".join(f"{name}: {value}\r\n" for name, value in own.items())


OUT = {"binary_data_output": True}
TRAIN = {"mode": "train", **OUT}
CASES = {
    "json": case(batch(), binary=False),
    "bytes": case(batch(), binary=True, parameters=OUT),
    "half": case(batch(6, torch.float16), "FP16", binary=True, parameters=OUT, id="7"),
    "train": case(batch(), binary=True, parameters=TRAIN),
    "train with a key": case(batch(), binary=True, parameters=TRAIN, headers="Idempotency-Key: k\r\n"),
    "a bad key": case(batch(), binary=True, parameters=TRAIN, headers="Idempotency-Key: a b\r\n"),
    "one row": case(batch(1), binary=True, parameters=TRAIN),
    "a kept state": case(batch(), binary=True, parameters={"at": 1}),
    "a state that is not kept": case(batch(), binary=True, parameters={"at": 9}),
    "raw": (bytes(32), f"{LENGTH}: 0\r\n"),
    "channels": case(batch().reshape(4, 3), binary=True),
    "no JSON": (b"{", ""),
    "no body": (b"", ""),
    "a length that is wrong": (b"{}", f"{LENGTH}: 3\r\n"),
    "compressed": (b"{}", "Content-Encoding: gzip\r\n"),
    "in a thread": case(torch.ones(1 << 18, 2), binary=True, parameters=TRAIN),
    "from a web page": (b"{}", "Origin: http://evil\r\n"),
}


@pytest.mark.parametrize("version", ["", "/versions/1"])
@pytest.mark.parametrize("name", CASES)
async def test_the_answers_are_those_of_asgi(service, name, version):
    body, headers = CASES[name]
    found = []
    for layer, way in (("bn", ""), ("bm", ORDINARY)):
        service.by_asgi = 0
        call = post(f"/v2/models/{layer}{version}/infer", body, "application/octet-stream", headers + way)
        answers = [comparable(got) for got in [*await service.ask(call), *await service.ask(call)]]
        assert service.by_asgi == (2 if way else 0)
        answers.append((await service.ask(get(f"/v1/layers/{layer}/state", "Accept: application/json\r\n")))[0][2])
        found.append(json.dumps(answers, default=repr).replace(f"layer '{layer}'", "layer").replace(layer, "bx"))
    assert found[0] == found[1]


async def test_tokens_are_checked_on_both_ways(monkeypatch):
    async with serving(monkeypatch, token="all", read_token="look") as service:
        for parameters, given, status in (
            ({}, "", 401),
            ({}, "Authorization: Bearer look\r\n", 200),
            (TRAIN, "Authorization: Bearer look\r\n", 403),
            (TRAIN, "Authorization: Bearer all\r\n", 200),
        ):
            body, headers = case(batch(), binary=True, parameters=parameters, headers=given)
            answers = []
            for layer, way in (("bn", ""), ("bm", ORDINARY)):
                (got,) = await service.ask(post(f"/v2/models/{layer}/infer", body, headers=headers + way))
                answers.append(json.dumps(comparable(got), default=repr).replace(layer, "bx"))
                assert got[0] == status
            assert answers[0] == answers[1]
