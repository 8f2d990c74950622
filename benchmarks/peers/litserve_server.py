"""LitServe: bodies are JSON or forms; base64 in JSON is the fastest that carries a tensor.

No `from __future__ import annotations`: LitServe looks at the annotations themselves.
"""

import sys
from typing import Any

import litserve

from benchmarks.peers.arithmetic import normalize_text


class BatchNorm(litserve.LitAPI):
    """Eval mode."""

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def decode_request(self, request: dict[str, Any]) -> str:
        """The text in the body."""
        return request["data"]

    def predict(self, x: str) -> str:
        """Normalize."""
        return normalize_text(x)

    def encode_response(self, output: str) -> dict[str, Any]:
        """The answer."""
        return {"data": output}


if __name__ == "__main__":
    server = litserve.LitServer(BatchNorm(), accelerator="cpu", workers_per_device=1)
    server.run(port=int(sys.argv[1]), num_api_servers=1, log_level="error", generate_client_file=False)
