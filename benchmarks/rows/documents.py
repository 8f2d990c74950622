"""Eval in JSON, against handlers that do the same."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.bodies import json_call, square
from benchmarks.figures import Row, Target, in_turns, ratio
from benchmarks.load import Call, request


def json(bench: Bench) -> Iterator[Row]:
    """256x256 numbers there and back."""
    body = square()
    ours = Call(bench.service.port, [json_call(bench.layer("square", 256), body)], 4)
    for name, path, what, least in (
        ("plain", "/eval", "orjson and numpy", 1.6),
        ("naive", "/eval", "FastAPI and pydantic's list[list[float]], a dict as the answer", 40),
        ("naive", "/eval-typed", "the same with a response model", 40),
    ):
        theirs = Call(bench.opponent(name).port, [request(path, body, "application/json")], 4)
        bench.warm(ours, theirs)
        pairs = in_turns(bench.pace.rounds, lambda: bench.rate(ours), lambda theirs=theirs: bench.rate(theirs))
        yield ratio(f"eval JSON 256x256, against {what}", Target(least), pairs)
