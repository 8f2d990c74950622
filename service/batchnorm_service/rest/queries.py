"""Query parameters as pydantic models: unknown ones are refused, and OpenAPI describes the same models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar, cast, get_args
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from batchnorm_client.kernels.digest import DIGEST_PATTERN
from batchnorm_client.wire.errors import InvalidRequest
from batchnorm_client.wire.headers import KEY_PATTERN
from batchnorm_client.wire.names import STATE_PATTERN
from batchnorm_service.layers import GroupCall

from .documents import invalid_request

MAX_MEMBERS: Final = 4096

_NUMBERS: Final = (
    (int, re.compile(r"-?[0-9]+"), "Input should be an integer in decimal digits"),
    (float, re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?"), "Input should be a number in decimal digits"),
)
"""How numbers are written. pydantic also takes `+3`, `1_0`, `3.0` for an integer, and spaces around it."""


class Query(BaseModel):
    """Base class of the query parameters of an operation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoQuery(Query):
    """No query parameters."""


class StateQuery(Query):
    """Query parameters of a call that reads a layer's state."""

    at: str | None = Field(
        None,
        pattern=f"^({STATE_PATTERN.pattern})$",
        max_length=200,
        description="a kept state instead of the newest: its version, or the tag of a pin",
    )

    @property
    def state(self) -> int | str | None:
        """The version or the tag; None for the newest state."""
        return int(self.at) if self.at is not None and self.at.isdecimal() else self.at


class WaitQuery(Query):
    """Query parameter of the calls that may wait for another state."""

    wait: float | None = Field(
        None,
        ge=0,
        le=60,
        allow_inf_nan=False,
        description="with If-None-Match: seconds to wait for another state before the response is 304",
    )


class TensorsQuery(WaitQuery, StateQuery):  # in this order, `at` is validated first
    """Query parameters of a layer's state."""

    @field_validator("wait")
    @classmethod
    def _waits_for_the_newest(cls, wait: float | None, info: ValidationInfo) -> float | None:
        if wait is not None and info.data.get("at") is not None:
            raise ValueError("a kept state does not change: wait does not go with at")
        return wait


class StatesQuery(WaitQuery):
    """Query parameters of the states of several layers."""

    prefix: str | None = Field(None, min_length=1, max_length=200, description="all layers whose names start with this")
    names: str | None = Field(
        None,
        min_length=1,
        max_length=32_000,
        validate_default=True,
        description="the layers' names, separated by commas",
    )

    @field_validator("names")
    @classmethod
    def _one_of_both(cls, names: str | None, info: ValidationInfo) -> str | None:
        if "prefix" in info.data and (names is None) == (info.data["prefix"] is None):
            raise ValueError("either prefix or names must be given")
        return names


class ExpectQuery(StateQuery):
    """Query parameters of inverse."""

    expect: str | None = Field(
        None,
        pattern=f"^{DIGEST_PATTERN.pattern}$",
        description="the digest of the state; the call is refused if it would use another one",
    )


class StatisticsQuery(Query):
    """Query parameter of the calls that normalize."""

    statistics: Literal["true", "false"] = Field(
        "false", description="also return batch_mean, batch_var (biased) and batch_invstd; not in .npy"
    )


class EvalQuery(ExpectQuery, StatisticsQuery):
    """Query parameters of eval."""


class GroupQuery(Query):
    """Query parameters of a call whose batch may be a shard of a synchronized batch."""

    group: str | None = Field(
        None, pattern=f"^{KEY_PATTERN.pattern}$", description="the id of the synchronized batch; use a new one for each"
    )
    size: int | None = Field(
        None, ge=1, le=MAX_MEMBERS, validate_default=True, description="how many members the group has"
    )
    timeout: float = Field(
        30.0, gt=0, le=600, allow_inf_nan=False, description="seconds that this member waits for the others"
    )

    @field_validator("size")
    @classmethod
    def _goes_with_group(cls, size: int | None, info: ValidationInfo) -> int | None:
        if "group" in info.data and (size is None) != (info.data["group"] is None):
            raise ValueError("group and size go together")
        return size

    @property
    def group_call(self) -> GroupCall | None:
        """The group to join, or None."""
        if self.group is None or self.size is None:
            return None
        return GroupCall(self.group, self.size, self.timeout)


class MomentsQuery(GroupQuery):
    """Query parameters of moments."""


class TrainQuery(GroupQuery, StatisticsQuery):
    """Query parameters of train."""

    normalize: Literal["batch", "running"] = Field(
        "batch",
        description="with `running`, the batch is folded and then normalized with the running statistics right after "
        "its own fold; not in a group, nor for a layer that tracks none",
    )

    @field_validator("normalize")
    @classmethod
    def _not_in_a_group(cls, normalize: str, info: ValidationInfo) -> str:
        if normalize == "running" and info.data.get("group") is not None:
            raise ValueError("a group's shards are normalized with the statistics of the whole batch: batch only")
        return normalize


class BackwardQuery(GroupQuery):
    """Query parameters of backward."""

    mode: Literal["train", "eval"] = Field("train", description="the mode of the forward pass")


Q = TypeVar("Q", bound=Query)


def parse_query(model: type[Q], query_string: bytes) -> Q:
    """The query parameters as a `model`.

    Raises:
        InvalidRequest: a parameter is unknown, repeated or out of range.
    """
    if len(query_string) <= 64:
        return cast(Q, _parse_cached(model, query_string))
    return _parse(model, query_string)


def _parse(model: type[Q], query_string: bytes) -> Q:
    known = {name: field.annotation for name, field in model.model_fields.items()}
    try:
        return model.model_validate(split_query(query_string, known) if query_string else {})
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False), list(known)) from None


_parse_cached = lru_cache(maxsize=256)(_parse)


def split_query(query_string: bytes, known: Mapping[str, Any]) -> dict[str, str]:
    """The query parameters as text.

    Args:
        query_string: as it was sent.
        known: the annotation of each parameter; those of numbers must be written in decimal digits.

    Raises:
        InvalidRequest: the query string cannot be read, or a parameter is unknown, repeated or no number.
    """
    try:
        pairs = parse_qsl(
            query_string.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=50,
        )
    except ValueError:
        raise InvalidRequest("the query string cannot be read", field="query", expected=list(known)) from None
    values: dict[str, str] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidRequest(
                f"{name}: is given more than once", field=name, expected=f"one of {', '.join(known) or 'none'}"
            )
        values[name] = value
    wrong = [
        ErrorDetails(type="extra_forbidden", loc=(name,), msg="", input=None) for name in values if name not in known
    ] or [
        ErrorDetails(type="number", loc=(name,), msg=message, input=value)
        for name, value in values.items()
        for number, pattern, message in _NUMBERS
        if number in (known[name], *get_args(known[name])) and not pattern.fullmatch(value)
    ]
    if wrong:
        raise invalid_request(wrong, list(known))
    return values
