"""What every target promises: a result, or a refusal that can be told to the caller. Anything else is a fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from batchnorm_client.wire.errors import RequestError
from batchnorm_service.rest.problems import respond_problem


class BrokenPromiseError(Exception):
    """What a target found; the message says what differs."""


class Refused(NamedTuple):
    """A refusal: the exception's class."""

    kind: type[Exception]


def attempt(call: Callable[..., Any], *arguments: Any, refusals: tuple[type[Exception], ...] = (RequestError,)) -> Any:
    """What a call returns, or `Refused`.

    Args:
        call: what is tried.
        arguments: its arguments.
        refusals: the exceptions by which it may refuse. A `ProblemError` among them must make a problem document.
    """
    try:
        return call(*arguments)
    except refusals as error:
        if isinstance(error, RequestError):
            _check_told(error)
        return Refused(type(error))


def _check_told(error: RequestError) -> None:
    response = respond_problem(error, "/", "request")
    document = json.loads(b"".join(response.pieces))
    same(document["status"], error.status, "the status in the document")
    if not 400 <= response.status_code < 500:
        raise BrokenPromiseError(f"{response.status_code} for a refusal")


def same(got: Any, expected: Any, what: str) -> None:
    """Raise `BrokenPromiseError` unless the two are equal."""
    if got != expected:
        raise BrokenPromiseError(f"{what}: {_short(got)} instead of {_short(expected)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 2000 else f"{text[:2000]}..."


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """A module with other constants, so that small inputs take the ways of large ones."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
