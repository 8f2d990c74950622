"""A tensor as it is sent: a dtype's name, a shape, and a buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from batchnorm_client.wire.errors import InvalidRequest, MalformedBody

Buffer = bytes | bytearray | memoryview
Array = npt.NDArray[Any]

MAX_RANK: Final = 64
"""The maximum rank of numpy and torch."""

MAX_BYTES: Final = 2**63 - 1
"""The maximum size of an array, where a dimension of 0 counts as 1, as in numpy."""

NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    dtype.name: dtype
    for dtype in map(
        np.dtype,
        ("|b1", "|u1", "|i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8", "<c8"),
    )
}
"""numpy's dtypes, little-endian, by name."""

_ITEMSIZES: Final[dict[str, int]] = {name: dtype.itemsize for name, dtype in NUMPY_DTYPES.items()} | {
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}

_WORDS: Final = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
"""A dtype of each size, with this alignment."""


def itemsize(dtype: str) -> int:
    """The size of one element in bytes.

    Args:
        dtype: a name as torch has it, such as "float32" or "bfloat16".

    Raises:
        ValueError: no such dtype can be sent.
    """
    try:
        return _ITEMSIZES[dtype]
    except KeyError:
        raise ValueError(f"no dtype {dtype!r}; there are {', '.join(_ITEMSIZES)}") from None


@lru_cache(maxsize=64)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """numpy's name of a dtype, which is also torch's; cached, since numpy takes 3 microseconds to build it."""
    return dtype.name


class _Parts(NamedTuple):  # a tuple is quicker to make than a frozen dataclass: each call makes some
    dtype: str
    shape: tuple[int, ...]
    buffer: Buffer


class Tensor(_Parts):
    """A tensor as it is sent; numpy and torch view its buffer.

    Attributes:
        dtype: torch's name of the dtype: "float16", "bfloat16", "float32", "float64", "int64", ...
        shape: the dimensions; () for a scalar.
        buffer: the elements in C order, little-endian, `product(shape) * itemsize(dtype)` bytes.

    Raises:
        ValueError: the dtype is not known, or the buffer is not as long as the shape says.
    """

    __slots__ = ()

    def __new__(cls, dtype: str, shape: tuple[int, ...], buffer: Buffer) -> Self:
        """Checks the buffer's length."""
        expected = math.prod(shape) * itemsize(dtype)
        size = buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
        if size != expected:
            raise ValueError(f"{dtype} of shape {shape} has {expected} bytes; the buffer has {size}")
        return tuple.__new__(cls, (dtype, shape, buffer))

    @classmethod
    def unchecked(cls, dtype: str, shape: tuple[int, ...], buffer: Buffer) -> Self:
        """A tensor whose buffer is known to have the right length, because it was checked or made for the shape."""
        return tuple.__new__(cls, (dtype, shape, buffer))

    @classmethod
    def of(cls, array: Array) -> Tensor:
        """The tensor of an array: a view if the array is C-contiguous and little-endian, otherwise a copy.

        Raises:
            TypeError: the array has a dtype that cannot be sent, such as object or str.
        """
        name = dtype_name(array.dtype)
        dtype = NUMPY_DTYPES.get(name)
        if dtype is None:
            raise TypeError(f"numpy's {name} cannot be sent; {', '.join(NUMPY_DTYPES)} can")
        straight = np.asarray(array, dtype=dtype, order="C")
        return cls(name, straight.shape, straight.reshape(-1).view(np.uint8).data)

    def numpy(self) -> Array:
        """An array that shares this tensor's buffer, never a copy; it is writable if the buffer is.

        Raises:
            TypeError: numpy does not have the dtype (bfloat16, float8).
        """
        dtype = NUMPY_DTYPES.get(self.dtype)
        if dtype is None:
            raise TypeError(f"numpy has no {self.dtype}")
        return np.ndarray(self.shape, dtype, buffer=self.buffer)

    @property
    def nbytes(self) -> int:
        """The buffer's length in bytes."""
        return self.buffer.nbytes if isinstance(self.buffer, memoryview) else len(self.buffer)


def byte_view(body: Buffer) -> memoryview:
    """A body as a flat view of bytes."""
    view = memoryview(body)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def view_tensor(dtype: str, shape: tuple[int, ...], view: memoryview) -> Tensor:
    """A tensor on a part of a body, which is as long as the shape says.

    A copy only where the data are not aligned, as torch's kernels want them to be.
    """
    if view.nbytes and not np.frombuffer(view, _WORDS[itemsize(dtype)]).flags.aligned:
        return Tensor.unchecked(dtype, shape, bytearray(view))
    return Tensor.unchecked(dtype, shape, view)


def checked_shape(shape: Any, item: int, *, field: str) -> tuple[int, ...]:
    """The dimensions that a header declares, once they are known to be ones that an array can have.

    Raises:
        MalformedBody: not non-negative integers, more than 64 of them, or more bytes than an address space has.
    """
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise MalformedBody(f"{field}: the shape must be a list of non-negative integers", field=field)
    if len(shape) > MAX_RANK:
        raise MalformedBody(
            f"{field}: a tensor has at most {MAX_RANK} dimensions", field=field, expected=MAX_RANK, got=len(shape)
        )
    if math.prod(n or 1 for n in shape) * item > MAX_BYTES:
        raise MalformedBody(f"{field}: the shape that the header declares is too large", field=field)
    return tuple(shape)


def check_known(tensors: Mapping[str, object], known: Mapping[str, str]) -> None:
    """Refuse tensors that are not among those known here.

    Raises:
        InvalidRequest: names the first that is not.
    """
    if tensors.keys() <= known.keys():
        return
    name = next(name for name in tensors if name not in known)
    raise InvalidRequest(
        f"no tensor {name[:200]!r} is known here; expected {', '.join(known)}", field=name[:200], expected=list(known)
    )
