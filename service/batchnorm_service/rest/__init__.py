"""The REST interface: reads HTTP requests, calls `Layers`, and writes responses and problem documents.

    gateway ── calls that carry a batch ──> endpoints ─┐     looked up in a dict, without a router
      └─────── everything else ──> FastAPI ────────────┴──> layers.Layers

Most requests with a batch or its moments use the fast path instead of ASGI (`batchnorm_service.fast_path`).
Routes for JSON documents are FastAPI's, with typed parameters and models (`routes`, `layers`, `health`, `pages`).
Tensor bodies are read by hand, because their media type is negotiated and pydantic does not parse them.
"""

from batchnorm_service.rest.application import ApiOptions, build_api
from batchnorm_service.rest.bodies import BodyBuffer
from batchnorm_service.rest.connections import Connections, RequestLimits
from batchnorm_service.rest.gateway import Gateway
from batchnorm_service.rest.headers import Headers, read_headers
from batchnorm_service.rest.layer_request import LayerRequest
from batchnorm_service.rest.responses import JOIN_BYTES, Response
from batchnorm_service.rest.target import Target
from batchnorm_service.rest.transfers import Transfers

__all__ = [
    "JOIN_BYTES",
    "ApiOptions",
    "BodyBuffer",
    "Connections",
    "Gateway",
    "Headers",
    "LayerRequest",
    "RequestLimits",
    "Response",
    "Target",
    "Transfers",
    "build_api",
    "read_headers",
]
