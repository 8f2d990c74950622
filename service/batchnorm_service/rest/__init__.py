"""HTTP and nothing else: requests in, calls to `Layers`, answers and problems out.

    gateway ── what is called for every batch ──> endpoints ─┐     a table: no router in between
      └───── all the rest ──> FastAPI ───────────────────────┴──> layers.Layers

Most requests that bring a batch or its moments come by the fast path, without ASGI (`batchnorm_service.fast_path`).
Routes for JSON documents are FastAPI's, with typed parameters and models (`routes`, `layers`, `health`, `pages`).
Tensor bodies are read by hand, since their forms are negotiated and they are not parsed in Python.
"""

from batchnorm_service.rest.application import ApiOptions, build_api
from batchnorm_service.rest.bodies import BodyBuffer
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
    "Gateway",
    "Headers",
    "LayerRequest",
    "Response",
    "Target",
    "Transfers",
    "build_api",
    "read_headers",
]
