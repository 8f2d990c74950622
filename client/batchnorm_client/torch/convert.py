"""Converting whole models: every batch normalization becomes a layer of the service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict, TypeGuard, Unpack, cast, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_client import Client, LayerOptions
from batchnorm_client.options import Normalize
from batchnorm_client.torch.batchnorms import REMOTE
from batchnorm_client.torch.groups import Compute
from batchnorm_client.torch.kept import check_fits, expected_digests, read_kept
from batchnorm_client.torch.model_calls import ModelCalls
from batchnorm_client.torch.modules import RemoteBatchNorm, layer_options
from batchnorm_client.torch.pending_moments import PendingMoments
from batchnorm_client.torch.plain import M, swap
from batchnorm_client.torch.running import parameters_of
from batchnorm_client.torch.takeover import Claim, Existing, take_over


class RemoteOptions(TypedDict, total=False):
    """The options of `RemoteBatchNorm` that torch's module does not have."""

    non_finite: Literal["reject", "allow"]
    compute: Compute
    normalize: Normalize
    group: str | None
    group_size: int | None
    group_timeout: float | None


def convert_batchnorm(
    module: M,
    client: Client,
    prefix: str,
    *,
    existing: Existing | None = None,
    at: str | None = None,
    expect: Mapping[str, str] | None = None,
    **options: Unpack[RemoteOptions],
) -> M:
    """Replace every `nn.BatchNorm1d/2d/3d` of a model by a layer of the service, as `convert_sync_batchnorm` does.

    A new layer gets the module's weight, bias, running statistics and counter, and so does one that exists and was not
    used. A layer was used if batches were tracked, or if one of its tensors has neither its initial value nor the
    module's. `existing` says what to do with layers that were used:

        "error"         raise `LayerExists`; the default
        "adopt"         the model takes their state: for a job that was restarted and continues, and for data-parallel
                        workers, each of which converts its model
        "overwrite"     they get the module's state, including its counters: for a run that starts from the beginning.
                        This affects all others who use these layers

    All layers are checked before any is written.

    Parameters stay the same objects, so that an optimizer that was made before keeps working. Train or eval mode is
    kept. A module that occurs twice becomes one layer, named after its first place. Remote modules are not changed.
    Hooks registered on the replaced modules are lost.

    **For evaluation with pinned statistics**, `at` names the pin of every layer, as `pin` made it. Then layers are only
    read, and the modules are frozen: both in train and in eval mode they normalize with the kept state, and weight and
    bias get its values and require no gradients (see `RemoteBatchNorm`). `expect` has the digests that `pin` returned.

    Args:
        module: the model; changed in place.
        client: a client of the service.
        prefix: layers are called `prefix` + the module's path, such as "resnet." + "layer1.0.bn1"; a model that is
            itself a batch normalization is called `prefix`. Models with the same prefix share their layers.
        existing: what to do with layers that were used before. Not together with `at` or `expect`.
        at: a tag. All layers must have this pin.
        expect: the digest that each layer's state must have, by layer name; without `at`, its newest state.
        options: `non_finite`, `compute`, `normalize`, `group`, `group_size`, `group_timeout`, as in `RemoteBatchNorm`.
            With `compute="local"` and without a group, one call per training step folds the moments of all layers:
            after the model's forward pass, or before a layer is evaluated or its running statistics are read, or by
            `flush`. (If only a part of the model is called, its moments are sent on the latter occasions.)

    Returns:
        `module`, or what replaces it if it is itself a batch normalization.

    Raises:
        LayerExists: a layer was used before, and `existing` is "error"; or a layer was created with another config.
            Nothing was changed in the model or the service, unless somebody used a layer at the same time.
        TypeError: the model has a SyncBatchNorm, a lazy module or another subclass, which a layer of the service cannot
            replace; or parameters that are not float32 or float64. Nothing was changed.
        InvalidRequest: a module's path is not a valid layer name. Nothing was changed.
        VersionNotFound: layers have no pin `at`; all of them are named. Nothing was changed.
        DigestMismatch: a layer's state has another digest than `expect` says. Nothing was changed.
        ValueError: `existing` is unknown; a layer to be adopted has a bias, and the module has none; a kept state does
            not fit its module; `expect` has digests of other layers; or `existing`, `non_finite` or a group beside `at`
            or `expect`. Nothing was changed.
    """
    frozen = at is not None or expect is not None
    given = [name for name, value in ({"existing": existing} | options).items() if value is not None]
    if frozen and (unused := [name for name in given if name != "compute"]):
        raise ValueError(f"{', '.join(unused)}: not together with at= or expect=, which only read layers")
    if existing not in (None, *get_args(Existing)):
        raise ValueError(f"existing must be 'error', 'adopt' or 'overwrite', not {existing!r}")
    found = {prefix + path: local for path, local in module.named_modules() if _is_local(local, path)}
    non_finite = options.get("non_finite", "reject")
    digests = expected_digests(list(found), expect)
    if frozen:
        _check_kept(client, found, at, digests)
    else:
        claims = [
            Claim(one, client, client.layer(name), _layer_options(one, non_finite)) for name, one in found.items()
        ]
        take_over(claims, existing or "error")
    remotes = [_remote(local, client, name, options, at, digests[name]) for name, local in found.items()]
    for local, remote in zip(found.values(), remotes, strict=True):
        _move_parameters(local, remote)
    converted = swap(module, dict(zip(found.values(), remotes, strict=True)))
    if remotes and not frozen:
        _call_together(converted, remotes, client)
    if remotes and not frozen and options.get("compute") == "local" and options.get("group") is None:
        _fold_together(converted, remotes, client)
    return cast(M, converted)


def flush(module: nn.Module) -> None:
    """Send the pending moments of a model that was converted with `compute="local"`.

    Raises:
        ProblemError: for a layer. Moments that were refused (4xx) are dropped; others stay pending.
        BatchNormError: for the whole call. Its moments stay pending, and another flush counts nothing twice.
    """
    for found in module.modules():
        if isinstance(found, RemoteBatchNorm):
            found.flush()


def _check_kept(
    client: Client, found: Mapping[str, _BatchNorm], at: str | None, digests: Mapping[str, str | None]
) -> None:
    """Read all kept states before any module is replaced."""
    kept = read_kept([client.layer(name, at=at, expect=digests[name]) for name in found])
    for layer, local in zip(kept, found.values(), strict=True):
        check_fits(layer, local.num_features, _layer_options(local, "reject"))
        parameters_of(layer, local)


def _call_together(root: nn.Module, remotes: list[RemoteBatchNorm], client: Client) -> None:
    calls = ModelCalls(client)
    for remote in remotes:
        remote._calls = calls
        calls.join(remote)
    calls.attach(root)


def _fold_together(root: nn.Module, remotes: list[RemoteBatchNorm], client: Client) -> None:
    pending = PendingMoments(client)
    for remote in remotes:
        remote._pending = pending
        pending.join(remote, remote.name)
    pending.attach(root)


def _is_local(module: nn.Module, path: str) -> TypeGuard[_BatchNorm]:
    """Whether to convert this module. Raises TypeError for a batch normalization that cannot be converted."""
    if not isinstance(module, _BatchNorm) or isinstance(module, RemoteBatchNorm):
        return False
    where = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
    if type(module) not in REMOTE:
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


def _layer_options(module: _BatchNorm, non_finite: Literal["reject", "allow"]) -> LayerOptions:
    tracks = module.running_mean is not None
    return layer_options(
        module, REMOTE[type(module)]._dimensions, tracks=tracks, dtype=_dtype(module), non_finite=non_finite
    )


def _remote(
    local: _BatchNorm, client: Client, name: str, options: RemoteOptions, at: str | None, expect: str | None
) -> RemoteBatchNorm:
    return REMOTE[type(local)](
        local.num_features,
        eps=local.eps,
        momentum=local.momentum,
        affine=local.affine,
        track_running_stats=local.running_mean is not None,
        dtype=_dtype(local),
        bias=not local.affine or local.bias is not None,
        client=client,
        name=name,
        at=at,
        expect=expect,
        **options,
    )


def _move_parameters(local: _BatchNorm, remote: RemoteBatchNorm) -> None:
    """Give a remote module the local one's Parameter objects, with the service's values."""
    for name, parameter in list(local.named_parameters(recurse=False)):
        with torch.no_grad():
            parameter.copy_(remote.get_parameter(name))
        remote.register_parameter(name, parameter)
    if remote.is_frozen:
        remote.freeze_parameters()
    remote.train(local.training)
