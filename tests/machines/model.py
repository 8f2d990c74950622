"""What a layer must be: torch's own module, fed the same batches, and the contract's rules of refusal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

MODULES = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INPUTS = {"float32": (torch.float16, torch.bfloat16, torch.float32), "float64": (torch.float64,)}
KEYED = ("train", "moments", "reset")


@dataclass(frozen=True, eq=False)
class Call:
    """A call that may change a layer.

    Attributes:
        operation: train, moments, reset, patch, put_state or delete.
        content: a batch, moments by name, what to reset, fields to set, or tensors by name.
        key: the Idempotency-Key.
        match: the version in If-Match.
        flaw: the problem that this content has in any layer that it was made for.
    """

    operation: str
    content: Any = None
    key: str | None = None
    match: int | None = None
    flaw: str | None = None

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Calls with one key are the same call if they have the same fingerprint."""
        if self.operation == "train":
            return self.operation, self.content.dtype, self.content.shape, raw(self.content)
        if self.operation == "moments":
            return (self.operation, *(raw(tensor) for tensor in self.content.values()))
        return self.operation, self.content


class Receipt(NamedTuple):
    """What the first call with a key was told."""

    fingerprint: tuple[Any, ...]
    version: int
    batches: int


@dataclass(frozen=True, eq=False)
class View:
    """A layer as GET shows it."""

    config: dict[str, Any]
    version: int
    batches: int
    samples: int
    tensors: dict[str, Tensor]
    created: Any


@dataclass(eq=False)
class Model:
    """A layer.

    Attributes:
        config: with all fields that matter here.
        dimensions: of the module; batches have rank dimensions + 2, or 2 for BatchNorm1d.
        version: the newest that a caller was told.
        samples: values per channel that were folded.
        values: of a population layer, all of them, (C, n) float64.
        receipts: by key.
        slack: how far running_var may be from torch's, (C,): one unit in the last place per fold.
        inexact: whether moments were folded that a caller rounded to float64.
    """

    config: dict[str, Any]
    dimensions: int
    version: int
    created: Any
    samples: int = 0
    values: list[np.ndarray] = field(default_factory=list)
    receipts: dict[str, Receipt] = field(default_factory=dict)
    slack: Any = 0.0
    inexact: bool = False

    def __post_init__(self) -> None:
        self.module = MODULES[self.dimensions](
            self.channels,
            eps=self.config["eps"],
            momentum=self.config["momentum"],
            affine=self.config["affine"],
            track_running_stats=self.config["track_running_stats"],
            dtype=self.dtype,
        ).requires_grad_(requires_grad=False)
        self.module._check_input_dim = lambda _: None  # a layer without dimensions takes every rank

    @property
    def channels(self) -> int:
        return self.config["num_features"]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.config["dtype"])

    @property
    def population(self) -> bool:
        return self.config["statistics"] == "population"

    @property
    def tracks(self) -> bool:
        return self.module.track_running_stats and self.module.running_mean is not None

    @property
    def batches(self) -> int:
        return 0 if self.module.num_batches_tracked is None else int(self.module.num_batches_tracked)

    @property
    def axis(self) -> int:
        return self.config["channel_axis"]

    # ------------------------------------------------------------------------------------------------- refusals

    def refusals(self, call: Call) -> set[str]:
        """The problems that a call has: it is refused with one of them, or accepted if there is none."""
        problems = set() if call.flaw is None else {call.flaw}
        if call.match not in (None, self.version):
            problems.add("version-mismatch")
        match call.operation:
            case "train":
                problems |= self._refusals_of_batch(call.content)
            case "moments":
                problems |= self._refusals_of_moments(call.content)
            case "patch":
                problems |= self._refusals_of_patch(call.content)
        return problems

    def refusals_of_eval(self, batch: Tensor) -> set[str]:
        """As `refusals`, of a batch in eval mode."""
        problems = self._misfits(batch)
        if not problems and self.module.running_mean is None and batch.numel() == self.channels:
            problems.add("too-few-values")
        return problems

    def _misfits(self, batch: Tensor) -> set[str]:
        problems = set()
        if batch.dtype not in INPUTS[self.config["dtype"]]:
            problems.add("dtype-mismatch")
        ranks = {None: range(2, 64), 1: (2, 3), 2: (4,), 3: (5,)}[self.config["dimensions"]]
        if batch.dim() not in ranks or batch.shape[self.axis] != self.channels:
            problems.add("shape-mismatch")
        return problems

    def _refusals_of_batch(self, batch: Tensor) -> set[str]:
        problems = self._misfits(batch)
        if "shape-mismatch" not in problems and batch.numel() // self.channels < (1 if self.population else 2):
            problems.add("too-few-values")
        return problems | self._non_finite(batch)

    def _refusals_of_moments(self, moments: dict[str, Tensor]) -> set[str]:
        problems = set()
        if moments["mean"].shape != (self.channels,) or moments["var"].shape != (self.channels,):
            problems.add("shape-mismatch")
        if int(moments["count"]) < (1 if self.population else 2):
            problems.add("too-few-values")
        return problems | self._non_finite(moments["mean"]) | self._non_finite(moments["var"])

    def _refusals_of_patch(self, fields: dict[str, Any]) -> set[str]:
        problems = set()
        for name in fields.keys() & {"weight", "bias"}:
            if not self.config["affine"]:
                problems.add("invalid-request")
            elif len(fields[name]) != self.channels:
                problems.add("shape-mismatch")
        if fields.get("track_running_stats") and self.module.running_mean is None:
            problems.add("invalid-request")
        if self.population and fields.get("momentum") is not None:
            problems.add("invalid-request")
        return problems

    def _non_finite(self, tensor: Tensor) -> set[str]:
        """What is folded must be finite, and so must be what it is folded into, unless the layer allows it."""
        finite = bool(tensor.isfinite().all())
        if self.tracks:
            running = self.values if self.population else [self.module.running_mean, self.module.running_var]
            finite &= all(np.isfinite(np.asarray(one)).all() for one in running)
        return set() if finite or self.config["non_finite"] == "allow" else {"non-finite"}

    # -------------------------------------------------------------------------------------------------- changes

    def apply(self, call: Call) -> Tensor | None:
        """Make the change; return the output of a train call."""
        output = None
        match call.operation:
            case "train":
                output = self._train(call.content)
            case "moments":
                self._fold_moments(**call.content)
            case "reset":
                self._reset(call.content)
            case "patch":
                self._patch(call.content)
            case "put_state":
                self._put_state(call.content)
        return output

    def output(self, batch: Tensor) -> Tensor:
        """A batch normalized with its own statistics, in the layout that the service has: the channels in place 1."""
        moved = batch.movedim(self.axis, 1)
        module = self.module
        buffers = [module.running_mean.clone(), module.running_var.clone()] if self.tracks else [None, None]
        normalized = torch.batch_norm(  # BatchNorm's forward, which refuses one value per channel
            moved, module.weight, module.bias, *buffers, True, 0.1, module.eps, False
        )
        return self._clipped(normalized).movedim(1, self.axis)

    def eval(self, batch: Tensor, running: dict[str, Tensor]) -> Tensor:
        """A batch normalized with these running statistics; with its own if the layer never had any."""
        if not running or not batch.numel():
            return self.output(batch) if batch.numel() else batch
        moved, module = batch.movedim(self.axis, 1), self.module
        normalized = torch.batch_norm(
            moved,
            module.weight,
            module.bias,
            running["running_mean"],
            running["running_var"],
            False,
            0.0,
            module.eps,
            False,
        )
        return self._clipped(normalized).movedim(1, self.axis)

    def _clipped(self, output: Tensor) -> Tensor:
        clip = self.config["clip"]
        return output if clip is None else output.clamp(-clip, clip)

    def _train(self, batch: Tensor) -> Tensor:
        moved = batch.movedim(self.axis, 1)
        if batch.numel() == self.channels:
            output = self.output(batch)
            if self.tracks:
                self.module.num_batches_tracked += 1
        else:
            output = self._clipped(self.module.train()(moved)).movedim(1, self.axis)
            if self.tracks and self.dtype == torch.float32:
                momentum = 1 / self.batches if self.module.momentum is None else self.module.momentum
                self.slack = (1 - momentum) * self.slack + _ulp(self.module.running_var)
        self._count(moved.transpose(0, 1).reshape(self.channels, -1).double().numpy())
        return output

    def _count(self, values: np.ndarray) -> None:
        if self.tracks:
            self.samples += values.shape[1]
            self.values.append(values)

    def _fold_moments(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        if not self.tracks:
            return
        module, number = self.module, self.batches + 1
        momentum = 1 / number if module.momentum is None else module.momentum
        unbiased = var * count / (count - 1)
        module.running_mean.copy_((1 - momentum) * module.running_mean.double() + momentum * mean)
        module.running_var.copy_((1 - momentum) * module.running_var.double() + momentum * unbiased)
        module.num_batches_tracked += 1
        self._count(samples_of(int(count), mean.numpy(), var.numpy()))
        self.inexact = True

    def _reset(self, what: str) -> None:
        if what in ("running_stats", "all"):
            self.module.reset_running_stats()  # nothing while tracking is off
            if self.tracks:
                self.samples, self.slack, self.values, self.inexact = 0, 0.0, [], False
        if what in ("parameters", "all") and self.config["affine"]:
            nn.init.ones_(self.module.weight)
            nn.init.zeros_(self.module.bias)

    def _patch(self, fields: dict[str, Any]) -> None:
        for name, value in fields.items():
            if name in ("weight", "bias"):
                getattr(self.module, name).copy_(torch.tensor(value, dtype=torch.float64))
            else:
                self.config[name] = value
        for name in fields.keys() & {"eps", "momentum", "track_running_stats"}:
            setattr(self.module, name, fields[name])

    def _put_state(self, tensors: dict[str, Tensor]) -> None:
        if "samples_tracked" in tensors:
            count = int(tensors["samples_tracked"])
            mean, var = tensors["population_mean"], tensors["population_m2"] / count
            self.values, self.samples = [samples_of(count, mean.numpy(), var.numpy())], count
        for name in tensors.keys() & self.module.state_dict().keys():
            getattr(self.module, name).copy_(tensors[name])
        if "running_var" in tensors:
            self.slack = 0.0


def samples_of(count: int, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """(C, count) values with this mean and biased variance."""
    pattern = np.zeros(count)
    if count > 1:
        pattern[:2] = 1, -1  # of mean 0 and variance 2 / count
    return mean[:, None] + np.sqrt(var * count / 2)[:, None] * pattern


def _ulp(vector: Tensor) -> np.ndarray:
    """A unit in the last place; below a power of two, that above it."""
    return np.spacing(np.nextafter(vector.nan_to_num(0, 0).numpy(), np.float32(np.inf)))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
