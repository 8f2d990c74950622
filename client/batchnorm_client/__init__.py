"""A client for the batch-normalization service, and the documents and exceptions that it shares with the service.

    from batchnorm_client import Client

    with Client() as client:
        layer = client.create_layer("obs", num_features=64)
        output = layer.train(batch).output

Calls take numpy arrays and torch tensors, and return the same kind, dtype and device. This package never imports torch
by itself, and httpx only when the first client is made.
"""

from batchnorm_client.async_client import AsyncClient
from batchnorm_client.async_follower import AsyncFollower
from batchnorm_client.async_layer import AsyncRemoteLayer
from batchnorm_client.client import Client
from batchnorm_client.core import Retry
from batchnorm_client.follower import Follower
from batchnorm_client.layer import RemoteLayer
from batchnorm_client.options import LayerChanges, LayerOptions
from batchnorm_client.results import (
    BatchStatistics,
    EvalResult,
    FoldResult,
    Gradients,
    LayerStates,
    Replaced,
    TrainResult,
)
from batchnorm_client.wire.documents import Drift, HistoryEntry, Layer, LayerConfig, LayerSummary, Pin
from batchnorm_client.wire.errors import (
    PROBLEMS,
    BatchNormError,
    BufferFull,
    ConnectionFailed,
    DeviceUnavailable,
    DigestMismatch,
    DtypeMismatch,
    Forbidden,
    GroupClosed,
    GroupIncomplete,
    GroupMismatch,
    IdempotencyKeyReused,
    InternalError,
    InvalidRequest,
    LayerExists,
    LayerNotFound,
    LayerPinned,
    MalformedBody,
    MethodNotAllowed,
    NoAnswer,
    NonFinite,
    NotAcceptable,
    NotFound,
    NotImplementedProblem,
    Overloaded,
    PayloadTooLarge,
    PinExists,
    ProblemError,
    RequestError,
    RequestTimeout,
    ServiceError,
    ShapeMismatch,
    StaleState,
    StoreUnavailable,
    TimedOut,
    TooFewValues,
    TooManyLayers,
    TooManyPins,
    Unauthenticated,
    UnexpectedAnswer,
    UnsupportedMediaType,
    VersionMismatch,
    VersionNotFound,
)

__all__ = [
    "PROBLEMS",
    "AsyncClient",
    "AsyncFollower",
    "AsyncRemoteLayer",
    "BatchNormError",
    "BatchStatistics",
    "BufferFull",
    "Client",
    "ConnectionFailed",
    "DeviceUnavailable",
    "DigestMismatch",
    "Drift",
    "DtypeMismatch",
    "EvalResult",
    "FoldResult",
    "Follower",
    "Forbidden",
    "Gradients",
    "GroupClosed",
    "GroupIncomplete",
    "GroupMismatch",
    "HistoryEntry",
    "IdempotencyKeyReused",
    "InternalError",
    "InvalidRequest",
    "Layer",
    "LayerChanges",
    "LayerConfig",
    "LayerExists",
    "LayerNotFound",
    "LayerOptions",
    "LayerPinned",
    "LayerStates",
    "LayerSummary",
    "MalformedBody",
    "MethodNotAllowed",
    "NoAnswer",
    "NonFinite",
    "NotAcceptable",
    "NotFound",
    "NotImplementedProblem",
    "Overloaded",
    "PayloadTooLarge",
    "Pin",
    "PinExists",
    "ProblemError",
    "RemoteLayer",
    "Replaced",
    "RequestError",
    "RequestTimeout",
    "Retry",
    "ServiceError",
    "ShapeMismatch",
    "StaleState",
    "StoreUnavailable",
    "TimedOut",
    "TooFewValues",
    "TooManyLayers",
    "TooManyPins",
    "TrainResult",
    "Unauthenticated",
    "UnexpectedAnswer",
    "UnsupportedMediaType",
    "VersionMismatch",
    "VersionNotFound",
]
