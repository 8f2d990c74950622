"""Batch normalization modules whose running statistics live in the service.

    from batchnorm_client import Client
    from batchnorm_client.torch import RemoteBatchNorm2d, convert_batchnorm, revert, snapshot

    client = Client("http://127.0.0.1:8000")
    norm = RemoteBatchNorm2d(64, client=client, name="layer1.bn")   # one module, like nn.BatchNorm2d(64)
    model = convert_batchnorm(model, client, prefix="resnet.")      # or every BatchNorm of a model
    ...                                                             # or compute="local": only moments are sent
    copied = snapshot(model)                                        # torch's modules, with the service's present state
    digests = pin(model, "ckpt-100k")                               # keep the present state of every layer
    model = revert(model)                                           # back to nn.BatchNorm*, with the service's state

Importing this package imports torch; `batchnorm_client` itself does not.
"""

from batchnorm_client.torch.batchnorms import RemoteBatchNorm1d, RemoteBatchNorm2d, RemoteBatchNorm3d
from batchnorm_client.torch.convert import convert_batchnorm, flush
from batchnorm_client.torch.modules import RemoteBatchNorm
from batchnorm_client.torch.pins import pin
from batchnorm_client.torch.plain import revert, snapshot

__all__ = [
    "RemoteBatchNorm",
    "RemoteBatchNorm1d",
    "RemoteBatchNorm2d",
    "RemoteBatchNorm3d",
    "convert_batchnorm",
    "flush",
    "pin",
    "revert",
    "snapshot",
]
