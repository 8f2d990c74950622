"""One module for each of torch's."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_client.torch.modules import RemoteBatchNorm


class RemoteBatchNorm1d(RemoteBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` as a layer of the service: (N, C) or (N, C, L). Arguments: see `RemoteBatchNorm`."""

    _dimensions = 1


class RemoteBatchNorm2d(RemoteBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` as a layer of the service: (N, C, H, W). Arguments: see `RemoteBatchNorm`."""

    _dimensions = 2


class RemoteBatchNorm3d(RemoteBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` as a layer of the service: (N, C, D, H, W). Arguments: see `RemoteBatchNorm`."""

    _dimensions = 3


REMOTE: dict[type[_BatchNorm], type[RemoteBatchNorm]] = {
    nn.BatchNorm1d: RemoteBatchNorm1d,
    nn.BatchNorm2d: RemoteBatchNorm2d,
    nn.BatchNorm3d: RemoteBatchNorm3d,
}
"""The remote module for each of torch's."""
