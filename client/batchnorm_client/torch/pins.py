"""Pinning the layers of a whole model."""

from __future__ import annotations

from torch import nn

from batchnorm_client import ProblemError
from batchnorm_client.torch.modules import RemoteBatchNorm


def pin(module: nn.Module, tag: str, *, key: str | None = None) -> dict[str, str]:
    """Pin the present state of every layer of a model under one tag.

    First, weight, bias and options of all modules are sent, and pending moments (see `push`), so that what is pinned
    is what the model evaluates with. Each pin is of one commit; while others train the layers, the pins of
    different layers may be of different times.

    If the service refuses some layers, the others are pinned nevertheless, and the error names those that are not.
    Repeat the call under the same tag: a layer that has not changed since it was pinned keeps its pin. One that
    has changed raises `PinExists`, unless both calls had the same `key`: then it keeps the pin of the first call.

    Args:
        module: the model.
        tag: as for `RemoteLayer.pin`.
        key: an idempotency key, which applies to each layer separately; by default a new one.

    Returns:
        The digests by layer name, to be stored beside the model: `convert_batchnorm` takes them as `expect`.

    Raises:
        ProblemError: for a layer, such as `PinExists`; a note names all that were not pinned.
        ValueError: a module evaluates a kept state. Nothing was sent.
        BatchNormError: for a whole call. The layers before were pinned.
    """
    remotes = [found for found in module.modules() if isinstance(found, RemoteBatchNorm)]
    if kept := [remote.name for remote in remotes if remote.is_frozen]:
        raise ValueError(f"the model evaluates kept states, which are not new: {', '.join(kept)}")
    for remote in remotes:
        remote.push()
    layers = {remote.name: remote.layer for remote in remotes}
    digests: dict[str, str] = {}
    errors: dict[str, ProblemError] = {}
    for name, layer in layers.items():
        try:
            digests[name] = layer.pin(tag, key=key).digest
        except ProblemError as error:
            errors[name] = error
    for first in errors.values():
        first.add_note(f"not pinned as {tag!r}: {', '.join(errors)}; {len(digests)} of {len(layers)} layers are")
        raise first
    return digests
