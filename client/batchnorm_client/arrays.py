"""Conversion between numpy or torch arrays and `Tensor`, the form in which they are sent.

torch is not imported here: a caller that passes a torch tensor has imported it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from batchnorm_client.wire.tensors import Tensor
from batchnorm_client.wire.tensors.tensor import dtype_name

if TYPE_CHECKING:
    import torch

    AnyArray = npt.NDArray[Any] | torch.Tensor

A = TypeVar("A", bound="AnyArray")
"""The caller's type of array; results have the same type."""


def to_wire(array: object) -> Tensor:
    """The tensor of an array: a view of its memory if that is contiguous and on the host, otherwise a copy.

    Args:
        array: a numpy array or a torch tensor of any shape, on any device; it is detached from autograd.

    Raises:
        TypeError: it is neither of these, or has a dtype that cannot be sent.
    """
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError("a masked array cannot be sent: its mask would be lost")
        return Tensor.of(np.asarray(array))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _from_torch(array)
    raise TypeError(f"a numpy array or a torch tensor is needed, not {type(array).__name__}")


def from_wire(tensor: Tensor, like: A) -> A:
    """An array with a tensor's data, of the same type and on the same device as another array.

    Args:
        tensor: any dtype.
        like: an array that `to_wire` takes.

    Returns:
        On the host a view of the tensor's buffer, on another device a copy.
    """
    if isinstance(like, np.ndarray):
        array = tensor.numpy()
        # The byte order of `like` too; it is not sent.
        return cast(A, array.astype(like.dtype, copy=False) if tensor.dtype == dtype_name(like.dtype) else array)
    return cast(A, to_torch(tensor).to(like.device))


def to_torch(tensor: Tensor) -> torch.Tensor:
    """A torch tensor that shares a tensor's buffer, which must be writable. Imports torch.

    The shape is set in place: `reshape` would return a view, and autograd forbids in-place changes of a view that a
    custom function returned.
    """
    import torch  # noqa: PLC0415 - imported only when needed

    dtype = getattr(torch, tensor.dtype)
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(tensor.buffer, dtype=dtype).resize_(tensor.shape)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """A numpy array that shares a tensor's buffer."""
    return tensor.numpy()


def _from_torch(tensor: torch.Tensor) -> Tensor:
    name = str(tensor.dtype).removeprefix("torch.")
    # Made contiguous on its device first: moving a strided tensor to the host would copy it twice.
    host = tensor.detach().contiguous().cpu()
    flat = host.reshape(-1).view(_torch().uint8)
    try:
        return Tensor(name, tuple(host.shape), flat.numpy().data)
    except ValueError:
        raise TypeError(f"torch's {name} cannot be sent") from None


def _torch() -> Any:
    return sys.modules["torch"]
