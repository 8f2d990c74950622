"""Conversion between the wire's tensors (`batchnorm_client.wire.tensors`) and torch's, without copies if possible."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from batchnorm_client.wire.errors import DtypeMismatch, ShapeMismatch
from batchnorm_client.wire.tensors import Tensor as WireTensor

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int64")
}
_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_ITEM: Final[dict[torch.dtype, torch.dtype]] = {torch.bfloat16: torch.int16}  # numpy has no bfloat16: views its bits


def to_torch(tensor: WireTensor) -> Tensor:
    """A torch tensor on the CPU: a view if the buffer is writable, else a copy.

    torch has no read-only tensors, so writing through a view could change immutable bytes.
    """
    dtype = TORCH_DTYPES[tensor.dtype]
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=dtype)
    if dtype not in _ITEM:
        array = tensor.numpy()
        return torch.from_numpy(array if array.flags.writeable else array.copy())  # twice as fast as torch.frombuffer
    buffer = tensor.buffer
    if memoryview(buffer).readonly:
        buffer = bytearray(buffer)
    return torch.frombuffer(buffer, dtype=dtype).view(tensor.shape)


def to_wire(tensor: Tensor) -> WireTensor:
    """A wire tensor: a view if the tensor is contiguous and on the CPU, else a copy."""
    dtype = tensor.dtype
    if tensor.requires_grad or not (tensor.is_cpu and tensor.is_contiguous()):
        tensor = tensor.detach().cpu().contiguous()
    array = (tensor.view(_ITEM[dtype]) if dtype in _ITEM else tensor).numpy()
    return WireTensor.unchecked(_NAMES[dtype], array.shape, array.data.cast("B") if array.size else b"")


def counter_to_wire(count: int) -> WireTensor:
    """A counter as an int64 scalar."""
    return WireTensor("int64", (), count.to_bytes(8, "little", signed=True))


def vector(tensor: WireTensor, field: str, dtype: str, size: int) -> Tensor:
    """A copy of a caller's tensor as a torch tensor, (size,).

    Raises:
        DtypeMismatch: its dtype is not `dtype`.
        ShapeMismatch: its shape is not (size,).
    """
    if tensor.dtype != dtype:
        raise DtypeMismatch(
            f"{field} must be {dtype}, got {tensor.dtype}", field=field, expected=dtype, got=tensor.dtype
        )
    if tensor.shape != (size,):
        raise ShapeMismatch(
            f"{field} must have shape ({size},), got {tensor.shape}",
            field=field,
            expected=[size],
            got=list(tensor.shape),
        )
    return to_torch(tensor).clone()
