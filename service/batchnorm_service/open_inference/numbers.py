"""JSON numbers as tensors of the protocol's data types."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from batchnorm_client.wire.errors import InvalidRequest
from batchnorm_client.wire.tensors import Tensor, json_tensors
from batchnorm_client.wire.tensors.regular_json import read_lists

from .documents import INPUT

_READ_AS: Final = {"float16": "float64", "bfloat16": "float64"}
_INFINITY: Final = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits of infinity."""


def numbers_in(lists: object, dtype: str) -> Tensor:
    """A tensor of nested lists of numbers, each rounded once, to the nearest, ties to even.

    Args:
        lists: as a parser of JSON made them.
        dtype: torch's name of the tensor's dtype.

    Raises:
        InvalidRequest: something in the lists is not a number, or does not fit the dtype.
        ShapeMismatch: the lists are ragged, or more than 64 deep.
    """
    return _narrow(json_tensors({INPUT: lists}, {INPUT: _READ_AS.get(dtype, dtype)})[INPUT], dtype)


def read_numbers(text: memoryview, dtype: str) -> Tensor:
    """The same from the lists' text, in pieces.

    Raises:
        UnusualError: for what `numbers_in` refuses, and some other texts.
        InvalidRequest: a number does not fit the dtype.
    """
    return _narrow(Tensor.of(read_lists(text, _READ_AS.get(dtype, dtype))), dtype)


def _narrow(tensor: Tensor, dtype: str) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    wide = tensor.numpy()
    with np.errstate(over="ignore"):
        bits = _bfloat16_bits(wide) if dtype == "bfloat16" else wide.astype(np.float16).view(np.uint16)
    lost = ((bits & 0x7FFF) == _INFINITY[dtype]) & np.isfinite(wide)
    if lost.any():
        got = float(wide[lost][0])
        raise InvalidRequest(f"{INPUT}: {got!r} does not fit {dtype}", field=INPUT, expected=dtype, got=got)
    return Tensor(dtype, wide.shape, bits.reshape(-1).view(np.uint8).data)


def _bfloat16_bits(wide: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers.

    To round twice without error, the first rounding, to float32, is to odd: towards zero, with the last bit set where
    something was lost (Boldo and Melquiond, 2008).
    """
    near = wide.astype(np.float32)
    bits = near.view(np.uint32)
    back = near.astype(np.float64)
    odd = (bits - (np.abs(back) > np.abs(wide))) | (back != wide)
    halves = odd.astype(np.uint64)
    rounded = (halves + 0x7FFF + ((halves >> 16) & 1)) >> 16
    return np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16)
