"""Converting back: a model with torch's own modules again, in place or as a copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_client import Layer
from batchnorm_client.torch.batchnorms import REMOTE
from batchnorm_client.torch.kept import read_kept
from batchnorm_client.torch.modules import RemoteBatchNorm, without_bias
from batchnorm_client.torch.origin import Origin
from batchnorm_client.torch.running import RUNNING, parameters_of, tensors_of

M = TypeVar("M", bound=nn.Module)


@overload
def revert(module: RemoteBatchNorm) -> _BatchNorm: ...
@overload
def revert(module: M) -> M: ...
def revert(module: nn.Module) -> nn.Module:
    """Undo `convert_batchnorm`: replace remote modules by torch's own, with the service's state.

    Weight and bias that changed since they were last sent are sent first. Layers stay in the service. Frozen modules
    give back their kept state, and weight and bias require gradients again if they did before.

    Args:
        module: the model; changed in place. Parameters stay the same objects.

    Returns:
        `module`, or what replaces it if it is itself a remote batch normalization.

    Raises:
        ValueError: a layer was given a bias, and the module was made with `bias=False`.
    """
    remotes = _remotes(module)
    reverted = swap(module, {remote: _reverted(remote) for remote in remotes})
    for remote in remotes:
        if remote._pending is not None:
            remote._pending.leave(remote)
        if remote._calls is not None:
            remote._calls.leave(remote)
    return reverted


@overload
def snapshot(module: RemoteBatchNorm, *, at: str | None = None) -> _BatchNorm: ...
@overload
def snapshot(module: M, *, at: str | None = None) -> M: ...
def snapshot(module: nn.Module, *, at: str | None = None) -> nn.Module:
    """A deep copy of a model with torch's own modules and the present state, independent of the service.

    For code that copies or pickles models: target networks (DQN, SAC), moving averages of weights (torch's
    `AveragedModel` takes a snapshot, and its `update_parameters` another one), checkpoints of whole models, other
    processes. The model and its layers are not changed; only pending moments are sent (see `flush`).

    Each layer is read once, so its tensors belong to one commit; different layers may be read at different times.
    Weight, bias and options that were changed and not sent yet are copied with their changes. Devices, dtypes, train or
    eval mode, `requires_grad` and modules or parameters that occur twice are kept. As with `copy.deepcopy`, gradients
    are not copied; neither are hooks on remote modules.

    The copy's `state_dict()` says where its statistics come from: `_metadata`, which torch saves and loads with it, has
    "layer" and "digest" for each of these modules, and "tag" if a pinned state was read (see `Origin`).

    Args:
        module: the model; it need not have remote modules.
        at: a tag: copy the states that were pinned with it, with their weight and bias, instead of the present ones.

    Raises:
        ValueError: a layer was given a bias, and the module was made with `bias=False`.
        VersionNotFound: layers have no pin `at`; all of them are named.
    """
    memo: dict[int, Any] = {}
    remotes = _remotes(module)
    kept: Sequence[Layer | None] = [None] * len(remotes)
    if at is not None:
        kept = read_kept([remote.client.layer(remote.name, at=at) for remote in remotes])
    for remote, layer in zip(remotes, kept, strict=True):
        memo[id(remote)] = _copied(remote, layer, at, memo)  # copy.deepcopy uses what is in the memo
    copied = copy.deepcopy(module, memo)
    for hooked in {one for remote in remotes for one in (remote._pending, remote._calls) if one is not None}:
        for found in copied.modules():
            hooked.detach(found)
    return copied


def swap(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules wherever they occur; one module may occur several times."""
    for parent in list(module.modules()):
        for key, child in list(parent._modules.items()):  # named_children() omits a second occurrence
            if child is not None and child in replacements:
                parent.add_module(key, replacements[child])
    return replacements.get(module, module)


def _remotes(module: nn.Module) -> list[RemoteBatchNorm]:
    return [found for found in module.modules() if isinstance(found, RemoteBatchNorm)]


def _reverted(remote: RemoteBatchNorm) -> _BatchNorm:
    remote.push()
    local = _torch_module(remote, remote.pull())
    if remote.is_frozen:
        for name in remote.trainable:
            local.get_parameter(name).requires_grad_(True)
    return local


def _copied(remote: RemoteBatchNorm, kept: Layer | None, tag: str | None, memo: dict[int, Any]) -> _BatchNorm:
    unsent: dict[str, Any] = {}
    if kept is None:
        remote.flush()
        unsent = remote.unsent()
    layer = kept or remote.layer.inspect()
    values = parameters_of(layer, remote) | unsent
    local = copy.deepcopy(_torch_module(remote, layer), memo)
    with torch.no_grad():
        for name, parameter in local.named_parameters():
            parameter.copy_(values[name])
    local.eps, local.momentum = unsent.get("eps", local.eps), unsent.get("momentum", local.momentum)
    local.track_running_stats = unsent.get("track_running_stats", local.track_running_stats)
    if tag is None and isinstance(remote.layer.at, str):
        tag = remote.layer.at
    Origin.of(layer, tag, local).attach(local)
    return local


def _torch_module(remote: RemoteBatchNorm, layer: Layer) -> _BatchNorm:
    """torch's module with the options and running statistics of a layer, and a remote module's Parameter objects."""
    tensors = tensors_of(layer)
    local_class = next(local for local, cls in REMOTE.items() if isinstance(remote, cls))
    local = local_class(
        remote.num_features,
        eps=layer.config.eps,
        momentum=layer.config.momentum,
        affine=remote.affine,
        track_running_stats="running_mean" in tensors,
        device=remote.state_device,
        dtype=remote.state_dtype,
        **without_bias(remote.affine and remote.bias is None),
    )
    for name, parameter in remote.named_parameters(recurse=False):
        local.register_parameter(name, parameter)
    for name in RUNNING:
        if name in tensors:
            local.get_buffer(name).copy_(tensors[name])
    local.track_running_stats = layer.config.track_running_stats
    return local.train(remote.training)
