"""BentoML: typed methods over JSON; one base64 string is the fastest that carries a tensor."""

from __future__ import annotations

import bentoml

from benchmarks.peers.arithmetic import normalize_text


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class BatchNorm:
    """Eval mode."""

    @bentoml.api
    async def eval(self, data: str) -> str:
        """Normalize."""
        return normalize_text(data)
