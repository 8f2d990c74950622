"""The kinds of running statistics, a row each: what both sides must know of a kind beside how it folds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import GetPydanticSchema
from pydantic_core import core_schema

KindName = Literal["moving", "population"]
"""The names of the kinds, for type checkers; at run time `STATISTICS` has them."""


class Kind(NamedTuple):
    """What a config may say of a kind of statistics, and what a kind needs of a batch.

    Attributes:
        description: for the interface's documentation.
        momentum: the default; None is the cumulative average, or no momentum at all.
        must_be_null: which fields of `LayerConfig` such a layer does not have, each with the reason in words.
        least_values: how many values per channel a training batch needs.
        exact_moments: whether a batch's moments are taken in float64, in a pass of their own; otherwise they are those
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
"""By the name that a layer's config has for it."""

Statistics = Annotated[KindName, GetPydanticSchema(lambda *_: core_schema.literal_schema(list(STATISTICS)))]
"""One of the table's names; any other is refused, and a JSON schema lists them."""
