"""Ray Serve: a deployment sees the whole request, so the tensor travels as it is."""

from __future__ import annotations

import sys
import time

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.peers.arithmetic import normalize


@serve.deployment(num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
class BatchNorm:
    """Eval mode."""

    async def __call__(self, request: Request) -> Response:
        """Normalize."""
        return Response(normalize(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(BatchNorm.bind(), route_prefix="/")
    while True:
        time.sleep(3600)
