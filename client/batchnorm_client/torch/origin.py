"""Where the statistics of a copied module come from, in its `state_dict()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_client import Layer
from batchnorm_client.kernels.digest import state_digest


@dataclass(slots=True, eq=False)
class Origin:
    """The state of a layer that a torch module is a copy of; a hook of its `state_dict()`.

    It adds "layer", "digest" and, if known, "tag" to the module's entry in `_metadata`, as long as the module still has
    this state: after it was trained, loaded or converted to another dtype, they would be wrong, and are left out.

    Attributes:
        layer: its name.
        tag: of the pin that was read; None if it was the newest state.
        digest: of the state; None if it cannot be computed (on the device "meta").
        dtype: of the layer, with `channel_axis` and `clip` a part of its digest that a torch module does not have.
        channel_axis: of the layer.
        clip: of the layer.
    """

    layer: str
    tag: str | None
    digest: str | None
    dtype: str
    channel_axis: int
    clip: float | None

    @classmethod
    def of(cls, layer: Layer, tag: str | None, module: _BatchNorm) -> Origin:
        """The origin of a module that was made from a layer's state, maybe with changes that were not sent."""
        config = layer.config
        origin = cls(layer.name, tag, None, config.dtype, config.channel_axis, config.clip)
        origin.digest = origin._digest(module)
        return origin

    def attach(self, module: _BatchNorm) -> None:
        """Make it part of the module's `state_dict()`. It is copied and pickled with the module."""
        module._register_state_dict_hook(self)  # type: ignore[no-untyped-call]

    def __call__(self, module: nn.Module, _state: dict[str, Any], _prefix: str, metadata: dict[str, Any]) -> None:
        """Add the entries: torch calls this after it has saved the module's tensors."""
        if isinstance(module, _BatchNorm) and self.digest is not None and self._digest(module) == self.digest:
            metadata |= {"layer": self.layer, "digest": self.digest}
            metadata |= {} if self.tag is None else {"tag": self.tag}

    def _digest(self, module: _BatchNorm) -> str | None:
        weight, bias = cast(Tensor | None, module.weight), cast(Tensor | None, module.bias)
        if weight is not None and bias is None:
            bias = weight.new_zeros(weight.shape)  # of a module with bias=False
        tensors = (module.running_mean, module.running_var, weight, bias)
        if any(tensor is not None and not self._has_its_dtype(tensor) for tensor in tensors):
            return None
        vectors = (None if tensor is None else tensor.detach().cpu().numpy() for tensor in tensors)
        return state_digest(self.dtype, self.channel_axis, module.eps, self.clip, vectors)

    def _has_its_dtype(self, tensor: Tensor) -> bool:
        return str(tensor.dtype) == f"torch.{self.dtype}" and not tensor.is_meta
