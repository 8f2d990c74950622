"""The states of several layers: what identifies them, and their tensors as one safetensors file."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from batchnorm_client.wire.errors import PayloadTooLarge
from batchnorm_client.wire.tensors import Tensor, encode_safetensors, itemsize

from ..engine.state_dict import state_dict
from ..runtime import Runtime
from .records import CommittedLayer, config_text

T = TypeVar("T")
Buffers = list[bytes | bytearray | memoryview]


@dataclass(frozen=True, eq=False)
class LayerStates:
    """Committed states of layers, by name, each the newest when it was read.

    Attributes:
        layers: by name.
    """

    layers: Mapping[str, CommittedLayer]
    _encoded: dict[str, asyncio.Task[Any]] = field(default_factory=dict)

    @cached_property
    def tag(self) -> str:
        """Identifies these states: others have another tag, also if a failover has used a version number again."""
        digest = hashlib.blake2b(digest_size=16)
        for name, layer in self.layers.items():
            digest.update(f"{name} {layer.stamp.incarnation} {layer.stamp.tag}\n".encode())
        return digest.hexdigest()

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """All tags by which a caller may know these states: `tag`; of a single layer, also its own and its version."""
        if len(self.layers) != 1:
            return (self.tag,)
        (layer,) = self.layers.values()
        return self.tag, layer.stamp.tag, str(layer.stamp.version)

    @property
    def tensors(self) -> int:
        """About how many tensors there are."""
        return 4 * len(self.layers)

    def file(self, max_bytes: int) -> Buffers:
        """A safetensors file with tensors named `<layer>.<tensor>`, and the layers' versions and configs as metadata.

        Raises:
            PayloadTooLarge: it would be larger than `max_bytes`.
        """
        tensors: dict[str, Tensor] = {}
        size = 0
        for name, layer in self.layers.items():
            for tensor_name, tensor in state_dict(layer.state).items():
                tensors[f"{name}.{tensor_name}"] = tensor
                size += tensor.nbytes
            check_size(size, max_bytes)
        versions = {name: layer.stamp.version for name, layer in self.layers.items()}
        wide_first = sorted(tensors.items(), key=lambda item: -itemsize(item[1].dtype))
        configs = ",".join(f'"{name}":{config_text(layer)}' for name, layer in self.layers.items())
        metadata = {"versions": json.dumps(versions), "configs": f"{{{configs}}}"}
        pieces: Buffers = list(encode_safetensors(dict(wide_first), metadata))
        check_size(size + len(pieces[0]), max_bytes)
        return pieces

    async def once(self, runtime: Runtime, form: str, encode: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `encode`, called once for each form of these states, however many calls ask for it."""
        task = self._encoded.get(form)
        if task is None:
            task = self._encoded[form] = runtime.create_task(encode())
        return await asyncio.shield(task)


def check_size(size: int, max_bytes: int) -> None:
    """Raise `PayloadTooLarge` if a file of this size is too large."""
    if size > max_bytes:
        raise PayloadTooLarge(
            f"the layers' state is larger than the {max_bytes} bytes that BATCHNORM_MAX_BODY_BYTES allows; "
            "ask for fewer layers",
            expected=max_bytes,
            got=size,
        )
