"""HTTP and nothing else: requests in, calls to `Layers`, answers and problems out.

    shell ── train, eval ──> normalize ─┐          the short way: no router in between
      └───── all the rest ─> FastAPI ───┴──> layers.Layers

Both ways share the modules that read requests (`headers`, `negotiation`, `conditions`, `queries`, `bodies`,
`documents`) and those that write answers (`answers`, `problems`).
"""

from batchnorm_service.api.service import ApiOptions, build_api
from batchnorm_service.api.shell import Shell

__all__ = ["ApiOptions", "Shell", "build_api"]
