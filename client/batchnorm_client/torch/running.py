"""Running statistics with torch's names, read from and written to the service."""

from __future__ import annotations

from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_client import Layer, RemoteLayer
from batchnorm_client.torch.model_calls import ModelCalls
from batchnorm_client.torch.pending_moments import PendingMoments

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
"""What torch keeps in buffers, and the service keeps for remote modules."""


def tensors_of(layer: Layer) -> dict[str, Tensor]:
    """A layer's tensors by torch's names, on the CPU, without those that its config leaves out."""
    vectors = {name: getattr(layer, name) for name in ("weight", "bias", "running_mean", "running_var")}
    dtype: torch.dtype = getattr(torch, layer.config.dtype)
    tensors = {name: torch.tensor(vector, dtype=dtype) for name, vector in vectors.items() if vector is not None}
    if layer.running_mean is not None:
        tensors["num_batches_tracked"] = torch.tensor(layer.num_batches_tracked)
    return tensors


def parameters_of(layer: Layer, module: _BatchNorm) -> dict[str, Tensor]:
    """A layer's weight and bias, those that the module has.

    Raises:
        ValueError: the layer has a bias other than 0, and the module was made without one.
    """
    values = {name: tensor for name, tensor in tensors_of(layer).items() if name in ("weight", "bias")}
    if "bias" in values and module._parameters["bias"] is None and values.pop("bias").any():
        raise ValueError(f"layer {layer.name!r} has a bias other than 0, and this module was made with bias=False")
    return values


class RemoteRunningStatistics(_BatchNorm):
    """A batch normalization module without buffers: its running statistics belong to a layer of the service.

    Attributes:
        layer: the layer's handle; not set while the constructor runs.
        state_dtype: of the layer.
    """

    layer: RemoteLayer
    state_dtype: torch.dtype
    _tracks: bool
    """Whether the layer was created with running statistics; `track_running_stats` may be toggled later."""
    _pending: PendingMoments | None
    """Pending moments that are sent together with those of other modules."""
    _calls: ModelCalls | None
    """Calls that are made together with those of other modules."""
    _device: torch.device
    """The device of tensors that are read, if the module has no parameters."""

    def push(self) -> None:
        """Send weight, bias and options that changed."""
        raise NotImplementedError

    def send_state(self, state: dict[str, Tensor]) -> None:
        """Replace tensors of the layer."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send pending moments, also those of the other modules of the model; see `convert_batchnorm`."""
        if self._pending is not None:
            self._pending.flush()

    def _forget_state(self) -> None:
        """This module changes its layer."""
        if self._calls is not None:
            self._calls.forget(self.layer.name)

    def _read(self, name: str) -> Tensor | None:
        if name in self._buffers:  # while a state_dict is loaded
            return self._buffers[name]
        if "layer" not in self.__dict__:
            raise AttributeError(name)  # torch's constructor expects that there is no attribute yet
        return self.read_running().get(name)

    def read_running(self) -> dict[str, Tensor]:
        """The service's running statistics by name, on the device of the parameters; empty if it has none.

        Those of population statistics also have the sums that they follow from.
        """
        if not self._tracks:
            return {}
        self.flush()
        state = self.layer.state_dict(as_torch=True)
        names = [*RUNNING, *(name for name in state if name not in {*RUNNING, "weight", "bias"})]
        return {name: state[name].to(self.state_device) for name in names}

    @property
    def state_device(self) -> torch.device:
        """The device of tensors that are read from the service."""
        return self._device if self.weight is None else self.weight.device

    def _write(self, name: str, value: Tensor | None) -> None:
        if value is None or not self._tracks:
            raise ValueError(f"{name}: whether a layer keeps running statistics is decided when it is created")
        self.flush()
        self.layer.load_state_dict({name: self._typed(name, value)})
        self._forget_state()

    def _typed(self, name: str, value: Tensor) -> Tensor:
        return value.to(torch.long if name == "num_batches_tracked" else self.state_dtype)

    @property
    def running_mean(self) -> Tensor | None:
        """(C,), read from the service; None if the layer has none."""
        return self._read("running_mean")

    @running_mean.setter
    def running_mean(self, value: Tensor | None) -> None:
        self._write("running_mean", value)

    @property
    def running_var(self) -> Tensor | None:
        """(C,), unbiased, read from the service; None if the layer has none."""
        return self._read("running_var")

    @running_var.setter
    def running_var(self, value: Tensor | None) -> None:
        self._write("running_var", value)

    @property
    def num_batches_tracked(self) -> Tensor | None:
        """(), int64, of all who train the layer, read from the service; None if the layer has none."""
        return self._read("num_batches_tracked")

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: Tensor | None) -> None:
        self._write("num_batches_tracked", value)

    def reset_running_stats(self) -> None:
        """Reset the service's running statistics, for all users; as in torch, this does nothing if tracking is off."""
        if "layer" in self.__dict__ and self.track_running_stats and self._tracks:
            self.push()  # the service also checks whether tracking is on
            self.layer.reset("running_stats")
            self._forget_state()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.read_running().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as torch does, then send what was loaded in one call; nothing is sent if a tensor does not fit.

        As in torch, missing and unexpected keys are reported, and the other tensors are loaded. (torch evaluates
        `strict` later: here it is always true.)
        """
        complaints = len(error_msgs)
        running = self.read_running()
        self._buffers.update(running)  # torch's own code checks and converts into these
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            loaded = {name: self._buffers[name] for name in running}
        finally:
            for name in running:
                self._buffers.pop(name, None)
        if len(error_msgs) == complaints:
            given = {
                name: tensor for name, tensor in loaded.items() if prefix + name in state_dict and tensor is not None
            }
            self.send_state({name: tensor.to(running[name].dtype) for name, tensor in given.items()})

    def _forget_buffers(self) -> None:
        for name in RUNNING:
            self._buffers.pop(name, None)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: the copy would be the same layer of the service. "
            "batchnorm_client.torch.snapshot(model) makes a copy with torch's own modules and the present statistics; "
            "state_dict() has what nn.BatchNorm* loads"
        )
