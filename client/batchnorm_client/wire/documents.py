"""The JSON documents of version 1, as pydantic models. Client and service import them, so names exist once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from batchnorm_client.wire.names import LAYER_NAME_PATTERN, TAG_PATTERN
from batchnorm_client.wire.statistics import STATISTICS, Kind, Statistics

MAX_FEATURES: Final = 1_048_576


INPUT_DTYPES: Final[dict[str, tuple[str, ...]]] = {
    "float32": ("float16", "bfloat16", "float32"),
    "float64": ("float64",),
}
"""The input dtypes that a layer accepts, by the dtype of its state. The output has the input's dtype."""

MAX_VERSION: Final = (1 << 63) - 1

Tag = Annotated[str, StringConstraints(pattern=rf"^({TAG_PATTERN.pattern})$", max_length=200)]
LayerName = Annotated[str, StringConstraints(pattern=rf"^{LAYER_NAME_PATTERN.pattern}$")]


class Document(BaseModel):
    """A JSON document of the HTTP interface: immutable, strict types, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="strings")


_RANKS: Final[dict[int | None, tuple[int, ...]]] = {1: (2, 3), 2: (4,), 3: (5,)}


def _dependent_fields(schema: dict[str, Any]) -> None:
    """Add what a field may be that depends on another: what the validators of `LayerConfig` check."""
    rules: list[Any] = []
    for name, kind in STATISTICS.items():
        nulls = {field: {"type": "null"} for field in kind.must_be_null}
        rules.append(_rule("statistics", name, nulls, implied=name == schema["properties"]["statistics"]["default"]))
    for dimensions, ranks in _RANKS.items():
        axis = {"minimum": 1 - max(ranks), "maximum": max(ranks) - 1}
        rules.append(_rule("dimensions", dimensions, {"channel_axis": axis}))
    schema["allOf"] = rules


def _rule(field: str, value: Any, properties: dict[str, Any], *, implied: bool = False) -> dict[str, Any]:
    """JSON Schema: if `field` has this value, also by its absence if that implies it, then these are the properties."""
    given = {"properties": {field: {"const": value}}, "required": [] if implied else [field]}
    return {"if": given, "then": {"properties": properties}}


class LayerConfig(Document):
    """What a layer is: BatchNorm's constructor arguments in torch's names, and what a service needs beside them."""

    model_config = ConfigDict(json_schema_extra=_dependent_fields)

    num_features: int = Field(ge=1, le=MAX_FEATURES, description="C, the number of channels")
    eps: float = Field(1e-5, gt=0, allow_inf_nan=False, description="added to the variance before the square root")
    statistics: Statistics = Field(
        "moving", description="; ".join(f"{name}: {kind.description}" for name, kind in STATISTICS.items())
    )
    momentum: float | None = Field(
        default_factory=lambda given: _kind(given).momentum,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="torch's sense: running = (1 - momentum) * running + momentum * batch; null = cumulative average, "
        "1/i. Population statistics take null only: it is their default, and has to be sent where a client sends 0.1",
        json_schema_extra={"default": 0.1},  # without it, generated clients send null
    )
    affine: bool = Field(True, description="has weight and bias")
    track_running_stats: bool = Field(True, description="keeps running statistics")
    dimensions: Literal[1, 2, 3] | None = Field(
        None, description="input ranks as BatchNorm1d/2d/3d take them; null = any rank >= 2"
    )
    channel_axis: int = Field(
        1,
        ge=-63,
        le=63,
        description="the axis of the channels; -1 = channels last; never 0",
        json_schema_extra={"not": {"const": 0}},
    )
    dtype: Literal["float32", "float64"] = Field("float32", description="of the state")
    device: str | None = Field(
        None, pattern=r"^(cpu|cuda(:(0|[1-9][0-9]{0,2}))?)$", description="null = the service's default"
    )
    non_finite: Literal["reject", "allow"] = Field(
        "reject", description="what a train batch gets that has NaN or infinity, or overflows its dtype"
    )

    half_life: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="population statistics only: after so many newer samples per channel, a sample counts half; "
        "null = every sample counts the same for ever",
    )
    clip: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="outputs are clamped to [-clip, clip]; null = not at all, as in torch",
    )

    @field_validator("momentum", "half_life")
    @classmethod
    def _statistics_have_it(cls, value: float | None, info: ValidationInfo) -> float | None:
        reason = _kind(info.data).must_be_null.get(info.field_name or "")
        if value is not None and reason:
            raise ValueError(reason)
        return value

    @field_validator("dimensions", mode="before")
    @classmethod
    def _true_is_not_one(cls, dimensions: Any) -> Any:
        if isinstance(dimensions, bool):
            raise ValueError("must be null, 1, 2 or 3")
        return dimensions

    @field_validator("channel_axis")
    @classmethod
    def _axis_exists(cls, axis: int, info: ValidationInfo) -> int:
        ranks = _RANKS.get(info.data.get("dimensions"), range(2, 65))
        if axis == 0 or not any(-rank < axis < rank for rank in ranks):
            raise ValueError("must name an axis of the input other than 0, which is the batch")
        return axis

    @property
    def input_ranks(self) -> tuple[int, ...] | None:
        """The ranks that a batch may have; None for any rank >= 2 (torch's BatchNorm1d/2d/3d)."""
        return _RANKS.get(self.dimensions)

    @property
    def smallest_rank(self) -> int:
        """The smallest rank that a batch may have."""
        axis = self.channel_axis
        return min(self.input_ranks) if self.input_ranks else max(2, axis + 1 if axis > 0 else 1 - axis)


def _kind(given: dict[str, Any]) -> Kind:
    """The kind of statistics of a config's fields so far; the default kind if the name was invalid."""
    return STATISTICS[given.get("statistics", "moving")]


def _number_or_name(value: Any) -> Any:
    """JSON has no NaN: non-finite elements are written as strings."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return value


Element = Annotated[
    float,
    BeforeValidator(_number_or_name, json_schema_input_type=float | Literal["NaN", "Infinity", "-Infinity"]),
]
# Only the first wrong element is reported: a list of a million errors would take seconds and gigabytes.
Vector = Annotated[list[Element], Field(max_length=MAX_FEATURES, fail_fast=True)]


_NEVER_NULL: Final = ("eps", "track_running_stats", "non_finite", "weight", "bias")


def _optional(schema: dict[str, Any]) -> None:
    """Remove defaults from the schema: a client generated from it would send null for each absent field."""
    for name, field in schema["properties"].items():
        del field["default"]
        if name in _NEVER_NULL:
            field.update(next(choice for choice in field.pop("anyOf") if choice != {"type": "null"}))


class LayerUpdate(Document):
    """What PATCH may set. A field that is absent stays as it is.

    `momentum: null` means cumulative; `half_life: null` forgets nothing, `clip: null` clips nothing.
    """

    model_config = ConfigDict(json_schema_extra=_optional)

    eps: float | None = Field(None, gt=0, allow_inf_nan=False)
    momentum: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    track_running_stats: bool | None = None
    non_finite: Literal["reject", "allow"] | None = None
    half_life: float | None = Field(None, gt=0, allow_inf_nan=False, description="in samples; population only")
    clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    weight: Vector | None = Field(None, description="gamma, (C,)")
    bias: Vector | None = Field(None, description="beta, (C,)")

    @field_validator(*_NEVER_NULL)
    @classmethod
    def _not_null(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("must not be null; leave it out to keep it as it is")
        return value

    def given(self) -> Iterator[tuple[str, Any]]:
        """The fields that the caller gave, with their values."""
        return ((name, getattr(self, name)) for name in type(self).model_fields if name in self.model_fields_set)


class ResetRequest(Document):
    """What to set back to its initial value, as torch's `reset_running_stats` and `reset_parameters` do."""

    what: Literal["running_stats", "parameters", "all"] = "running_stats"


class Layer(Document):
    """A layer's config and state. A tensor that the config leaves out is null."""

    name: str
    config: LayerConfig
    version: int
    num_batches_tracked: int
    samples_tracked: int = Field(description="values per channel that were folded, N*H*W each batch")
    running_mean: Vector | None
    running_var: Vector | None
    weight: Vector | None
    bias: Vector | None
    digest: str = Field(description="of the state; equal digests mean that eval gives the same output")
    created_at: datetime = Field(strict=False)
    updated_at: datetime = Field(strict=False)


class HistoryEntry(Document):
    """A state of a layer that can be read, rolled back to and pinned."""

    version: int
    num_batches_tracked: int
    samples_tracked: int
    operation: str = Field(description="what made it: create, train, update, reset, replace or rollback")
    at: datetime = Field(strict=False)
    digest: str


class HistoryPage(Document):
    """The newest state and those that are kept, newest first; `next` goes into `before` of the next call."""

    history: list[HistoryEntry]
    next: int | None


def _one_field(schema: dict[str, Any]) -> None:
    """Exactly one of the fields, and not null."""
    for field in schema["properties"].values():
        del field["default"]
        field.update(next(choice for choice in field.pop("anyOf") if choice != {"type": "null"}))
    schema |= {"minProperties": 1, "maxProperties": 1}


class RollbackRequest(Document):
    """The state to go back to: either a version, or a tag."""

    model_config = ConfigDict(json_schema_extra=_one_field)

    version: int | None = Field(None, ge=0, le=MAX_VERSION)
    tag: Tag | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if len(self.model_fields_set) != 1 or (self.version is None and self.tag is None):
            raise ValueError("give either version or tag, and not null")
        return self


class PinRequest(Document):
    """The state to pin; by default the newest."""

    version: int | None = Field(None, ge=0, le=MAX_VERSION)


class Pin(Document):
    """A state that is kept under a tag."""

    tag: str
    version: int
    digest: str
    at: datetime = Field(strict=False)


class Pins(Document):
    """All pins of a layer, by tag."""

    pins: list[Pin]


class ChannelDrift(Document):
    """The drift of one channel."""

    channel: int = Field(description="its index, from 0")
    z: float = Field(description="the smoothed shift of the batches' mean, in running standard deviations")
    log_var_ratio: float = Field(description="the logarithm of the smoothed ratio of their variance to the running one")


class ChannelDrifts(Document):
    """The drift of all channels, (C,) each: see `ChannelDrift`."""

    z: Vector
    log_var_ratio: Vector


class Drift(Document):
    """How far the batches that come in are from a layer's running statistics, smoothed over the batches."""

    batches: int = Field(description="how many batches were compared since the statistics were set")
    score: float = Field(
        description="of the worst channel, the part of |z| or |log_var_ratio| / 2 that noise does not explain"
    )
    worst: ChannelDrift | None = Field(description="the channel with this score; null before there is a batch")
    channels: ChannelDrifts
    threshold: float = Field(description="the score at which drift begins; it is over at half of it")
    drifting: bool
    since: datetime | None = Field(strict=False, description="when drift began; null if there is none")


class LayerSummary(Document):
    """A layer as a listing shows it."""

    name: str
    num_features: int
    version: int
    num_batches_tracked: int
    updated_at: datetime = Field(strict=False)


class LayerPage(Document):
    """A page of a listing, by name; `next` goes into `after` of the next call, null on the last page."""

    layers: list[LayerSummary]
    next: str | None


class ProblemDocument(BaseModel):
    """RFC 9457 problem details; extra members are fields that a program can use, such as `expected` and `got`."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str


MAX_ROWS: Final = 65_536
"""The most batches whose moments are folded as one stack."""


_Count = Annotated[int, Field(ge=0, le=2**63 - 1)]


class MomentsDocument(Document):
    """The moments of a batch: what a layer's running statistics need of it. Of M batches, each field has M rows."""

    count: _Count | Annotated[list[_Count], Field(min_length=1, max_length=MAX_ROWS)] = Field(
        description="values per channel, N*H*W; (M,) for a stack"
    )
    mean: Vector | list[Vector] = Field(description="(C,); (M, C) for a stack")
    var: Vector | list[Vector] = Field(description="as mean; biased: divided by count")


class FoldedDocument(Document):
    """Moments that were folded; the last three are of all shards of a group."""

    version: int
    num_batches_tracked: int
    replayed: bool = False
    folded: int | None = Field(None, description="how many batches the stack had")
    count: int | None = None
    mean: Vector | None = None
    var: Vector | None = None


class ManyMoments(Document):
    """The moments of many layers."""

    layers: dict[str, MomentsDocument]


class ManyFolded(Document):
    """What became of them: a result or a problem for each layer."""

    layers: dict[str, FoldedDocument | ProblemDocument]


class ReplacedDocument(Document):
    """A layer whose tensors were replaced."""

    version: int
    num_batches_tracked: int


class ManyReplaced(Document):
    """What became of the tensors of many layers: a result or a problem for each."""

    layers: dict[str, ReplacedDocument | ProblemDocument]
