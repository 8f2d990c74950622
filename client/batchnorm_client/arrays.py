"""numpy arrays and torch tensors <-> `Tensor`, the form in which they are sent.

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
"""The caller's kind of array; results have the same."""


def to_wire(array: object) -> Tensor:
    """An array's tensor: a view of its memory where that is contiguous and on the host, one copy otherwise.

    Args:
        array: a numpy array or a torch tensor, any shape, on any device; its gradient history is left behind.

    Raises:
        TypeError: it is neither, or has a dtype that cannot be sent.
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
    """An array on a tensor's buffer, of the same kind and on the same device as another.

    Args:
        tensor: any dtype.
        like: an array that `to_wire` takes.

    Returns:
        A view of the buffer on the host; a copy on another device.
    """
    if isinstance(like, np.ndarray):
        array = tensor.numpy()
        # The same dtype down to the byte order, which is not on the wire.
        return cast(A, array.astype(like.dtype, copy=False) if tensor.dtype == dtype_name(like.dtype) else array)
    return cast(A, to_torch(tensor).to(like.device))


def to_torch(tensor: Tensor) -> torch.Tensor:
    """A torch tensor on a tensor's buffer, which has to be writable; imports torch.

    Its shape is set in place: `reshape` would make a view, and autograd lets nobody modify in place a view that a
    custom function returned.
    """
    import torch  # noqa: PLC0415 - only for those who ask for it

    dtype = getattr(torch, tensor.dtype)
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(tensor.buffer, dtype=dtype).resize_(tensor.shape)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """A numpy array on a tensor's buffer."""
    return tensor.numpy()


def _from_torch(tensor: torch.Tensor) -> Tensor:
    name = str(tensor.dtype).removeprefix("torch.")
    # Made contiguous where it is: a strided tensor on a device would be copied twice if it were moved first.
    host = tensor.detach().contiguous().cpu()
    flat = host.reshape(-1).view(_torch().uint8)
    try:
        return Tensor(name, tuple(host.shape), flat.numpy().data)
    except ValueError:
        raise TypeError(f"torch's {name} cannot be sent") from None


def _torch() -> Any:
    return sys.modules["torch"]
