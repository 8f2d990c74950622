"""HTTP and nothing else: requests in, calls to `Layers`, answers and problems out.

    shell ── train, eval, inverse, moments ──> normalize, moments ─┐     the short way: no router in between
      └───── all the rest ──> FastAPI ─────────────────────────────┴──> layers.Layers

Most calls that bring a batch or its moments come on the direct way, without ASGI (`batchnorm_service.direct`).

Both ways share the modules that read requests (`headers`, `negotiation`, `conditions`, `queries`, `bodies`,
`documents`) and those that write answers (`answers`, `problems`).
"""

from batchnorm_service.api.answers import JOIN_BYTES, Answer
from batchnorm_service.api.bodies import BodyBuffer
from batchnorm_service.api.headers import Headers, read_headers
from batchnorm_service.api.service import ApiOptions, build_api
from batchnorm_service.api.shell import PendingAnswer, Shell
from batchnorm_service.api.target import Target
from batchnorm_service.api.transfers import Transfers

__all__ = [
    "JOIN_BYTES",
    "Answer",
    "ApiOptions",
    "BodyBuffer",
    "Headers",
    "PendingAnswer",
    "Shell",
    "Target",
    "Transfers",
    "build_api",
    "read_headers",
]
