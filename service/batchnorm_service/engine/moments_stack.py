"""`MomentsStack`: the moments of several batches, in order, which are folded as one update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from batchnorm_client.kernels.checks import check_enough
from batchnorm_client.wire.errors import InvalidRequest, ProblemError

from .moments import Moments

Array = npt.NDArray[Any]

_ROW_COST: Final = 1 << 10  # bytes: folding a row of few channels takes as long as one of 128 float64


@dataclass(frozen=True, slots=True, eq=False)
class MomentsStack:
    """Count, mean and variance per channel of several batches, as a caller sent them.

    They are in numpy, where an operation on a few channels has less overhead than in torch.

    Attributes:
        counts: values per channel of each batch, (M,).
        mean: (M, C) float64.
        var: (M, C) float64, biased: divided by the batch's count.
    """

    counts: list[int]
    mean: Array
    var: Array

    @property
    def batches(self) -> int:
        """M, the number of rows."""
        return len(self.counts)

    @property
    def cost(self) -> int:
        """How long folding takes, as the number of bytes that `ComputeExecutor` compares with its limit."""
        return max(self.mean.nbytes, _ROW_COST * self.batches)

    def row(self, number: int) -> Moments:
        """The moments of one batch."""
        mean, var = torch.from_numpy(self.mean[number]), torch.from_numpy(self.var[number])
        return Moments(self.counts[number], mean, var, correction=0)

    def rows(self) -> Iterator[Moments]:
        """The moments of each batch, in order."""
        return map(self.row, range(self.batches))

    def check_signs(self) -> None:
        """Raise `InvalidRequest` if a count or a variance is negative."""
        for name, values in (("count", np.array(self.counts)), ("var", self.var)):
            negative = values < 0
            if negative.any():
                row = int(negative.reshape(self.batches, -1).any(1).argmax())
                with in_row(row):
                    got = values[row].min().item()
                    raise InvalidRequest(f"{name} must not be negative", field=name, expected=">= 0", got=got)

    def check_enough(self, least: int) -> None:
        """Raise `TooFewValues` if a count is less than `least`."""
        if min(self.counts) < least:
            row = next(row for row, count in enumerate(self.counts) if count < least)
            with in_row(row):
                check_enough(self.counts[row], least, "count")

    def check_finite(self, mean_field: str, var_field: str) -> None:
        """Raise `NonFinite` if a mean or variance is NaN or infinite, naming the field that the caller sent."""
        with np.errstate(all="ignore"):
            if math.isfinite(np.vdot(self.mean, self.mean)) and math.isfinite(np.vdot(self.var, self.var)):
                return  # a finite sum of squares has finite terms; it can also overflow with finite terms
        finite = np.isfinite(self.mean).all(1) & np.isfinite(self.var).all(1)
        if not finite.all():
            row = int(finite.argmin())
            with in_row(row):
                self.row(row).check_finite(mean_field, var_field)


@contextmanager
def in_row(row: int) -> Iterator[None]:
    """Name the row, counted from 0, in a problem with one batch of a stack."""
    try:
        yield
    except ProblemError as error:
        raise type(error)(f"row {row}: {error.detail}", **error.fields, row=row) from None
