"""Layers that a converted model will use: whether they were used before, and whose state they get."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_client import (
    Client,
    Layer,
    LayerChanges,
    LayerExists,
    LayerNotFound,
    LayerOptions,
    RemoteLayer,
    VersionMismatch,
)
from batchnorm_client.torch.running import parameters_of, tensors_of

Existing = Literal["error", "adopt", "overwrite"]
"""What to do with layers that were used before: see `convert_batchnorm`."""

_INITIAL = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A module, and the layer for its state.

    Attributes:
        module: torch's module.
        client: of the service.
        layer: the layer's handle; the layer need not exist yet.
        options: for creating the layer.
    """

    module: _BatchNorm
    client: Client
    layer: RemoteLayer
    options: LayerOptions

    def find(self) -> Layer | None:
        """The layer, if it exists. Writes nothing.

        Raises:
            LayerExists: it was created with another config.
        """
        try:
            found = self.layer.inspect()
        except LayerNotFound:
            return None
        self._create()  # compares the config of a layer that exists
        return found

    def is_used(self, found: Layer) -> bool:
        """Whether batches were tracked, or a tensor has neither its initial value nor the module's."""
        own, theirs = self._state(), tensors_of(found)
        return found.num_batches_tracked > 0 or any(
            not torch.equal(theirs[name], own[name]) and not bool((theirs[name] == value).all())
            for name, value in _INITIAL.items()
            if name in theirs
        )

    def take(self, found: Layer | None, existing: Existing) -> None:
        """Create the layer if necessary, and write the module's state to it, unless a used layer is adopted.

        Args:
            found: the layer as it was read. It is written only if it has not changed since; otherwise it is read and
                checked again.
            existing: what to do with a layer that was used.

        Raises:
            LayerExists: the layer was used meanwhile, and `existing` is "error".
        """
        if found is None:
            self._create()
            found = self.layer.inspect()
        while existing == "overwrite" or not self.is_used(found):
            with suppress(VersionMismatch):
                return self._write(found)
            found = self.layer.inspect()
        if existing == "error":
            raise _used([self.layer.name])
        return None

    def _create(self) -> None:
        self.client.create_layer(self.layer.name, self.module.num_features, **self.options)

    def _write(self, layer: Layer) -> None:
        """Set counters, options and tensors to those of the module; equal ones are not sent.

        The tensors are sent last: until then the layer counts as unused, and may be written again.
        """
        if layer.samples_tracked:  # not part of the state's tensors; a reset clears it, if tracking is on
            if not layer.config.track_running_stats:
                layer = self.layer.update(track_running_stats=True, if_match=layer.version)
            layer = self.layer.reset(if_match=layer.version)
        wanted: dict[str, Any] = {name: self.options[name] for name in ("eps", "momentum", "non_finite")}
        wanted |= {"clip": None}
        if layer.running_mean is not None:
            wanted["track_running_stats"] = self.module.track_running_stats
        changes = {name: value for name, value in wanted.items() if getattr(layer.config, name) != value}
        if changes:
            layer = self.layer.update(if_match=layer.version, **cast(LayerChanges, changes))
        own, theirs = self._state(), tensors_of(layer)
        state = {name: tensor for name, tensor in own.items() if not torch.equal(tensor, theirs[name])}
        if state:
            self.layer.load_state_dict(state, if_match=layer.version)

    def _state(self) -> dict[str, Tensor]:
        """The module's tensors as the layer has them: on the CPU, and with a bias if there is a weight."""
        state = {name: tensor.cpu() for name, tensor in self.module.state_dict().items()}
        if "weight" in state:
            state.setdefault("bias", torch.zeros_like(state["weight"]))
        return state


def take_over(claims: Sequence[Claim], existing: Existing) -> None:
    """Write each module's state to its layer; a layer that was used keeps its own if `existing` is "adopt".

    Raises:
        LayerExists: a layer was used, and `existing` is "error"; or it was created with another config. Nothing was
            written, unless somebody used a layer while the others were checked.
        ValueError: a layer to be adopted has a bias, and the module has none. Nothing was written.
    """
    found = [claim.find() for claim in claims]
    used = [(claim, layer) for claim, layer in zip(claims, found, strict=True) if layer and claim.is_used(layer)]
    if used and existing == "error":
        raise _used([layer.name for _, layer in used])
    if existing == "adopt":
        for claim, layer in used:
            parameters_of(layer, claim.module)
    for claim, layer_or_none in zip(claims, found, strict=True):
        claim.take(layer_or_none, existing)


def _used(names: list[str]) -> LayerExists:
    which = f"layer {names[0]!r} was" if len(names) == 1 else f"layer {names[0]!r} and {len(names) - 1} more were"
    return LayerExists(
        f'{which} used before. existing="adopt" continues with the state that is there (a job that was started again, '
        'data-parallel workers), existing="overwrite" replaces it by this model\'s; another prefix makes other layers',
        layers=names,
    )
