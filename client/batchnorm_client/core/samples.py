"""What a handle sends for an array: a batch of the right dtype; and the result in the shape of what was given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar, get_args

import numpy as np

from batchnorm_client.arrays import A
from batchnorm_client.options import Cast
from batchnorm_client.results import EvalResult, Gradients, TrainResult

R = TypeVar("R", TrainResult[Any], EvalResult[Any], Gradients[Any])


def checked_cast(cast: Cast | None) -> Cast | None:
    """The same. Raises `ValueError` if it is no dtype that a batch can have."""
    if cast is not None and cast not in get_args(Cast):
        raise ValueError(f"cast={cast!r} must be one of {', '.join(get_args(Cast))}")
    return cast


def as_batch(x: A, cast: Cast | None) -> A:
    """The array as a batch: one sample, (C,), becomes (1, C); in the dtype `cast`, unless that is None."""
    array: Any = x
    if cast is not None and isinstance(x, np.ndarray):
        with np.errstate(over="ignore"):  # the service decides what it does with an infinity
            array = array.astype(cast, copy=False)
    elif cast is not None and hasattr(x, "detach"):
        import torch  # noqa: PLC0415 - x is one of its tensors

        array = array.to(getattr(torch, cast))
    batch: A = array[None] if getattr(array, "ndim", 0) == 1 else array
    return batch


def as_given(x: A, result: R, field: str = "output") -> R:
    """The result for what was given: the output of one sample, in `field`, is one sample."""
    return replace(result, **{field: getattr(result, field)[0]}) if x.ndim == 1 else result
