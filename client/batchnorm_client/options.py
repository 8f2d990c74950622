"""Types of the keyword arguments of calls: the fields of `LayerConfig` and `LayerUpdate`, and HTTP options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy.typing as npt

from batchnorm_client.wire.statistics import KindName

if TYPE_CHECKING:
    import os
    import ssl

    import httpx
    import torch

    File = str | os.PathLike[str]
    Numbers = npt.NDArray[Any] | torch.Tensor | Sequence[float]
    Rows = Numbers | Sequence[Sequence[float]]
    Moments = tuple[int | Numbers, Rows, Rows]
    from batchnorm_client.wire.tensors import Tensor

    StateDict = Mapping[str, npt.NDArray[Any] | torch.Tensor | Tensor | int]


class LayerOptions(TypedDict, total=False):
    """A layer's config without `num_features`. An option that is left out has torch's default.

    Attributes:
        eps: added to the variance before the square root; 1e-5.
        momentum: as in torch; 0.1. None is the cumulative average, and the only value for population statistics.
        affine: whether the layer has weight and bias; True.
        track_running_stats: whether the layer keeps running statistics; True.
        statistics: "moving" (torch's rule) or "population" (exact mean and unbiased variance over all samples seen).
        dimensions: 1, 2 or 3 for the input ranks of BatchNorm1d, 2d, 3d; None for any rank >= 2.
        channel_axis: the axis of the channels; 1. -1 for channels last.
        dtype: of the state, "float32" or "float64".
        device: where the state lives, "cpu", "cuda" or "cuda:N"; None for the service's default.
        non_finite: "reject" or "allow" a train batch that has NaN or infinity, or overflows.
        half_life: of population statistics, in samples; None weighs all samples equally.
        clip: outputs are clamped to [-clip, clip]; None for no limit.
    """

    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    statistics: KindName
    dimensions: Literal[1, 2, 3] | None
    channel_axis: int
    dtype: Literal["float32", "float64"]
    device: str | None
    non_finite: Literal["reject", "allow"]
    half_life: float | None
    clip: float | None


class LayerChanges(TypedDict, total=False):
    """What `update` may set. Options that are left out are not changed.

    Attributes:
        eps: added to the variance before the square root.
        momentum: as in torch; None is the cumulative average.
        track_running_stats: whether train calls change the running statistics, and eval calls use them.
        non_finite: "reject" or "allow".
        half_life: of population statistics, in samples; None weighs all samples equally.
        clip: outputs are clamped to [-clip, clip]; None for no limit.
        weight: gamma, (C,).
        bias: beta, (C,).
    """

    eps: float
    momentum: float | None
    track_running_stats: bool
    non_finite: Literal["reject", "allow"]
    half_life: float | None
    clip: float | None
    weight: Numbers
    bias: Numbers


class HttpOptions(TypedDict, total=False):
    """Options of the HTTP connections, with httpx's names.

    Attributes:
        timeout: seconds, or an `httpx.Timeout`; 30, and 5 to connect.
        limits: of the connection pool.
        verify: a file or directory of certificate authorities to trust, such as "ca.pem"; an SSL context; or False to
            trust any certificate. By default those of certifi, or of SSL_CERT_FILE and SSL_CERT_DIR.
        cert: a client certificate: the file of certificate and key, (certificate, key) or (certificate, key, password).
        proxy: its URL.
        trust_env: whether to use proxies and certificates from the environment; True.
    """

    timeout: float | httpx.Timeout | None
    limits: httpx.Limits
    verify: ssl.SSLContext | str | os.PathLike[str] | bool
    cert: str | os.PathLike[str] | tuple[File, File] | tuple[File, File, str]
    proxy: str | httpx.URL | httpx.Proxy
    trust_env: bool


What = Literal["running_stats", "parameters", "all"]
"""What to reset: running statistics, weight and bias, or both."""

Mode = Literal["train", "eval"]
"""The step whose gradient is computed."""

Normalize = Literal["batch", "running"]
"""What `train` normalizes with: the batch's own statistics, or the running ones right after its own fold."""

Cast = Literal["float16", "float32", "float64"]
"""The dtype that batches are converted to before they are sent."""
