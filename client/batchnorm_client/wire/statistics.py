"""The kinds of running statistics: a table of what both client and service must know of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import GetPydanticSchema
from pydantic_core import core_schema

KindName = Literal["moving", "population"]
"""The names of the kinds, for type checkers; at run time they are the keys of `STATISTICS`."""


class Kind(NamedTuple):
    """What a kind of statistics requires of a layer's config and of a batch.

    Attributes:
        description: for the interface's documentation.
        momentum: the default; None for the cumulative average, or if the kind has no momentum.
        must_be_null: the fields of `LayerConfig` that must be null, each with the reason in words.
        least_values: how many values per channel a training batch needs.
        exact_moments: whether a batch's moments are computed in float64, in a separate pass; otherwise they are those
            of torch's kernel, in the dtype of the layer's state.
    """

    description: str
    momentum: float | None
    must_be_null: Mapping[str, str]
    least_values: int
    exact_moments: bool


STATISTICS: Final[dict[str, Kind]] = {
    "moving": Kind(
        description="torch's rule",
        momentum=0.1,
        must_be_null={"half_life": "must be null unless statistics is population: moving statistics have a momentum"},
        least_values=2,
        exact_moments=False,
    ),
    "population": Kind(
        description="exact mean and unbiased variance over all samples seen",
        momentum=None,
        must_be_null={"momentum": "must be null for population statistics: every sample has the same weight"},
        least_values=1,
        exact_moments=True,
    ),
}
"""The kinds, by their name in a layer's config."""

Statistics = Annotated[KindName, GetPydanticSchema(lambda *_: core_schema.literal_schema(list(STATISTICS)))]
"""A name in the table; others are refused, and the JSON schema lists the names."""
