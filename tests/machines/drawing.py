"""What a machine draws: layers, batches that fit them and batches that do not, and changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from batchnorm_client.wire.documents import LayerConfig
from machines.model import INPUTS, Model

SEEDS = st.integers(0, 2**32 - 1)
EPS = st.sampled_from([1e-5, 1e-3, 0.5])
MOMENTA = st.sampled_from([0.1, None, 1 / 3, 0.0, 1.0])
GOOD = ("plain", "plain", "plain", "offset", "constant", "one value")
POPULATION = {"samples_tracked", "population_mean", "population_m2"}
BAD = ("empty", "nan", "infinity", "channels", "rank", "dtype")


@st.composite
def configs(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A layer's config, and the dimensions of its module."""
    dimensions = draw(st.sampled_from([1, 1, 2, 3]))
    statistics = draw(st.sampled_from(["moving", "moving", "population"]))
    chosen = {
        "num_features": draw(st.integers(1, 4)),
        "eps": draw(EPS),
        "statistics": statistics,
        "momentum": draw(MOMENTA) if statistics == "moving" else None,
        "affine": draw(st.booleans()),
        "track_running_stats": draw(st.sampled_from([True, True, True, False])),
        "dimensions": draw(st.sampled_from([dimensions, None])),
        "channel_axis": draw(st.sampled_from([1, -1])),
        "dtype": draw(st.sampled_from(["float32", "float64"])),
        "non_finite": draw(st.sampled_from(["reject", "allow"])),
        "clip": draw(st.sampled_from([None, None, 1.5])),
    }
    return LayerConfig(**chosen).model_dump(), dimensions


@dataclass(frozen=True)
class Batch:
    """A batch by what it is made of, which is shorter to print."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    def tensor(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        batch = torch.randn(self.shape, generator=generator, dtype=torch.float64) * 3 + 1
        match self.kind:
            case "offset":
                batch += 1e4
            case "constant":
                batch[:] = self.seed % 7 / 10
            case "nan" | "infinity":
                batch.view(-1)[0] = float(self.kind)
        return batch.to(self.dtype)


@st.composite
def batches(draw: st.DrawFn, model: Model, kinds: tuple[str, ...] = GOOD + BAD) -> Batch:
    """A batch for a layer, with the channels on its axis."""
    kind = draw(st.sampled_from(kinds))
    dtype = draw(st.sampled_from(INPUTS[model.config["dtype"]]))
    if kind == "dtype":
        dtype = draw(st.sampled_from([torch.int64, torch.float64 if model.dtype == torch.float32 else torch.float32]))
    if kind == "rank":
        return Batch(kind, (model.channels,), dtype, draw(SEEDS))
    rows = 0 if kind == "empty" else 1 if kind == "one value" else draw(st.integers(2, 6))
    rank = model.dimensions + 2 if model.dimensions > 1 else draw(st.sampled_from([2, 3]))
    shape = [rows, *[1 if kind == "one value" else draw(st.integers(1, 3))] * (rank - 2)]
    shape.insert(1 if model.axis == 1 else rank - 1, model.channels + (kind == "channels"))
    return Batch(kind, tuple(shape), dtype, draw(SEEDS))


def batches_with_moments(model: Model) -> st.SearchStrategy[Batch]:
    """A batch whose moments may be sent; sometimes of one channel too many."""
    return batches(model, (*GOOD, *GOOD, "nan", "channels"))


def moments_of(batch: Batch, axis: int) -> dict[str, Tensor]:
    """count, mean and biased variance."""
    values = batch.tensor().movedim(axis, 0).flatten(1).double()
    return {"count": torch.tensor(values.shape[1]), "mean": values.mean(1), "var": values.var(1, correction=0)}


@st.composite
def patches(draw: st.DrawFn, model: Model) -> dict[str, Any]:
    """One to three fields, some of which not every layer has."""
    sizes = st.sampled_from([model.channels] * 5 + [model.channels + 1])
    vectors = sizes.flatmap(lambda size: st.lists(st.floats(-3, 3, width=32), min_size=size, max_size=size))
    fields = {
        "eps": EPS,
        "momentum": MOMENTA,
        "track_running_stats": st.booleans(),
        "non_finite": st.sampled_from(["reject", "allow"]),
        "clip": st.sampled_from([None, 0.5, 100.0]),
        "weight": vectors,
        "bias": vectors,
    }
    names = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True))
    return {name: draw(fields[name]) for name in names}


@st.composite
def states(draw: st.DrawFn, model: Model) -> tuple[dict[str, Tensor], str | None]:
    """Some of a layer's tensors, and the problem that they have: one may be wrong."""
    tensors = _state(draw, model)
    kept = {name for name in sorted(tensors) if draw(st.booleans())}
    if kept & POPULATION:
        kept |= POPULATION
    sent = {name: tensor for name, tensor in tensors.items() if name in kept}
    vectors = [name for name in sent if sent[name].dim()]
    match draw(st.sampled_from([None, None, None, "unknown", "shape", "dtype", "negative"])):
        case "shape" if vectors:
            sent[vectors[-1]] = torch.ones(model.channels + 1, dtype=sent[vectors[-1]].dtype)
            return sent, "shape-mismatch"
        case "dtype" if vectors:
            sent[vectors[-1]] = sent[vectors[-1]].half()
            return sent, "dtype-mismatch"
        case "negative" if "running_var" in sent:
            return {**sent, "running_var": -sent["running_var"]}, "invalid-request"
        case None if sent:
            return sent, None
    return {**sent, "momentum": torch.ones(1)}, "invalid-request"  # which no state has


def _state(draw: st.DrawFn, model: Model) -> dict[str, Tensor]:
    """Every tensor that may be replaced; of a population layer, sums that a batch has."""
    names = model.module.state_dict().keys()
    tensors = {}
    if "running_mean" in names:
        tensors["num_batches_tracked"] = torch.tensor(draw(st.integers(0, 9)))
        if model.population:
            found = moments_of(draw(batches(model, ("plain", "one value"))), model.axis)
            tensors |= {"samples_tracked": found["count"], "population_mean": found["mean"]}
            tensors["population_m2"] = found["var"] * found["count"]
            names -= {"running_mean", "running_var"}
    generator = torch.Generator().manual_seed(draw(SEEDS))
    for name in sorted(names - {"num_batches_tracked"}):
        tensors[name] = torch.randn(model.channels, generator=generator, dtype=model.dtype).abs()
    return tensors
