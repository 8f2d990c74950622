"""Whole models: every batch normalization into the service, and back out of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_client import Client
from batchnorm_client.errors import VersionMismatch
from batchnorm_client.torch.folding import Folding
from batchnorm_client.torch.groups import Compute
from batchnorm_client.torch.modules import RemoteBatchNorm, without_bias
from batchnorm_client.torch.twins import RemoteBatchNorm1d, RemoteBatchNorm2d, RemoteBatchNorm3d

_REMOTE: dict[type[_BatchNorm], type[RemoteBatchNorm]] = {
    nn.BatchNorm1d: RemoteBatchNorm1d,
    nn.BatchNorm2d: RemoteBatchNorm2d,
    nn.BatchNorm3d: RemoteBatchNorm3d,
}


class RemoteOptions(TypedDict, total=False):
    """What `RemoteBatchNorm` takes and its torch twin does not."""

    non_finite: Literal["reject", "allow"]
    compute: Compute
    group: str | None
    group_size: int | None
    group_timeout: float | None


def convert_batchnorm(
    module: nn.Module, client: Client, prefix: str = "", **options: Unpack[RemoteOptions]
) -> nn.Module:
    """Swap every `nn.BatchNorm1d/2d/3d` of a model for a layer of the service, as `convert_sync_batchnorm` does.

    A layer that nobody has used yet takes over the module's weight, bias, running statistics and counter. One that was
    used keeps its state, and the model adopts it: so a job that was started again goes on where it was, and a second
    worker joins the first. (`load_state_dict` on the converted model overwrites the service's state.)

    Parameters stay the same objects, so that an optimizer that was made before keeps working. Train or eval mode stays.
    A module that occurs twice is one layer, named after the first place. Remote modules are left as they are. Hooks
    registered on the swapped modules are not carried over.

    Args:
        module: the model; changed in place.
        client: of the service.
        prefix: layers are called `prefix` + the module's path, such as "resnet." + "layer1.0.bn1"; a model that is
            itself a batch normalization is called `prefix`.
        options: `non_finite`, `compute`, `group`, `group_size`, `group_timeout`, as in `RemoteBatchNorm`. With
            `compute="local"` and without a group, one call per training step folds the moments of all layers: after the
            model's forward pass, or before a layer is evaluated or its running statistics are read, or by `flush`.
            (A part of the model that is called by itself has nobody to do that for it but those.)

    Returns:
        `module`, or what replaces it if it is itself a batch normalization.

    Raises:
        TypeError: a SyncBatchNorm, a lazy one, or another subclass, which does more than a layer of the service; or
            parameters that are not float32 or float64. Nothing was changed, neither here nor there.
        InvalidRequest: a path makes no layer name. Nothing was changed.
        LayerExists: such a layer exists with another config. The model was not changed.
    """
    plans = [_Plan(path, found, prefix + path) for path, found in module.named_modules() if _is_local(path, found)]
    for plan in plans:
        client.layer(plan.name)  # refuses names that cannot be
    remotes = [_create(plan, client, options) for plan in plans]
    for plan, remote in zip(plans, remotes, strict=True):
        _take_over(plan.module, remote)
    converted = _swap(module, {plan.module: remote for plan, remote in zip(plans, remotes, strict=True)})
    if remotes and options.get("compute") == "local" and options.get("group") is None:
        _fold_together(converted, remotes, client)
    return converted


def flush(module: nn.Module) -> None:
    """Send the moments that wait to be sent together: of a model that was converted with `compute="local"`.

    Raises:
        ProblemError: of a layer whose moments were refused.
        BatchNormError: of the call; what may be folded or not waits on, and another flush counts nothing twice.
    """
    for found in module.modules():
        if isinstance(found, RemoteBatchNorm):
            found.flush()


def revert(module: nn.Module) -> nn.Module:
    """Swap every remote batch normalization of a model for its torch twin with the service's state; the way back.

    Weight and bias that changed since they were last sent are sent first. Layers stay in the service.

    Args:
        module: the model; changed in place. Parameters stay the same objects.

    Returns:
        `module`, or what replaces it if it is itself a remote batch normalization.
    """
    remotes = [found for found in module.modules() if isinstance(found, RemoteBatchNorm)]
    reverted = _swap(module, {remote: _twin(remote) for remote in remotes})
    for remote in remotes:
        if remote._folding is not None:
            remote._folding.leave(remote)
    return reverted


def _fold_together(root: nn.Module, remotes: list[RemoteBatchNorm], client: Client) -> None:
    folding = Folding(client)
    for remote in remotes:
        remote._folding = folding
        folding.join(remote, remote.name)
    folding.attach(root)


class _Plan(NamedTuple):
    path: str
    module: _BatchNorm
    name: str


def _is_local(path: str, module: nn.Module) -> bool:
    """Whether this is to be converted; refuses what looks as if it should be, and cannot."""
    if not isinstance(module, _BatchNorm) or isinstance(module, RemoteBatchNorm):
        return False
    where = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
    if type(module) not in _REMOTE:
        hint = ""
        if isinstance(module, nn.SyncBatchNorm):
            hint = ": a layer of the service is shared by all processes anyway; start from nn.BatchNorm*"
        elif isinstance(module, nn.modules.lazy.LazyModuleMixin):
            hint = ": its number of channels is not known yet; run a batch through the model first"
        raise TypeError(f"{where} cannot be converted{hint}")
    if _dtype(module) not in {torch.float32, torch.float64}:
        raise TypeError(
            f"{where} is {_dtype(module)}, and layers are float32 or float64; their input may be half precision"
        )
    return True


def _dtype(module: _BatchNorm) -> torch.dtype:
    for tensor in (module.weight, module.running_mean):
        if tensor is not None:
            return tensor.dtype
    return torch.get_default_dtype()


def _lacks_bias(module: _BatchNorm) -> bool:
    return module.affine and module._parameters["bias"] is None


def _create(plan: _Plan, client: Client, options: RemoteOptions) -> RemoteBatchNorm:
    """The remote module, whose layer has the module's state if nobody had used it."""
    local = plan.module
    remote = _REMOTE[type(local)](
        local.num_features,
        eps=local.eps,
        momentum=local.momentum,
        affine=local.affine,
        track_running_stats=local.running_mean is not None,
        dtype=_dtype(local),
        bias=not _lacks_bias(local),
        client=client,
        name=plan.name,
        **options,
    )
    layer, state = remote.pull(), local.state_dict()
    if layer.updated_at == layer.created_at and state:
        # If somebody else is faster: adopt what they made of it.
        with suppress(VersionMismatch):
            layer = remote.layer.load_state_dict(state, if_match=layer.version)
            if local.running_mean is not None and not local.track_running_stats:
                remote.layer.update(track_running_stats=False, if_match=layer.version)
        remote.pull()
    return remote


def _take_over(local: _BatchNorm, remote: RemoteBatchNorm) -> None:
    """Give a remote module the local one's Parameter objects, with the service's values."""
    for name, parameter in list(local.named_parameters(recurse=False)):
        with torch.no_grad():
            parameter.copy_(remote.get_parameter(name))
        remote.register_parameter(name, parameter)
    remote.train(local.training)


def _twin(remote: RemoteBatchNorm) -> _BatchNorm:
    remote.push()
    state = remote.layer.state_dict(as_torch=True)
    local_class = next(local for local, cls in _REMOTE.items() if isinstance(remote, cls))
    local = local_class(
        remote.num_features,
        eps=remote.eps,
        momentum=remote.momentum,
        affine=remote.affine,
        track_running_stats="running_mean" in state,
        device=remote.state_device,
        dtype=remote.state_dtype,
        **without_bias(_lacks_bias(remote)),
    )
    for name, parameter in remote.named_parameters(recurse=False):
        local.register_parameter(name, parameter)
    local.load_state_dict({name: state[name] for name in local.state_dict()})  # population layers have more
    local.track_running_stats = remote.track_running_stats
    return local.train(remote.training)


def _swap(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put replacements wherever the originals are: a module may have several places."""
    for parent in list(module.modules()):
        for key, child in list(parent._modules.items()):  # named_children() leaves out a second place
            if child is not None and child in replacements:
                parent.add_module(key, replacements[child])
    return replacements.get(module, module)
