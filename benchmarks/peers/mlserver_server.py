"""MLServer: the Open Inference Protocol as JSON, bytes in base64 rather than lists of numbers."""

from __future__ import annotations

import asyncio
import sys

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.types import InferenceRequest, InferenceResponse, Parameters, ResponseOutput

from benchmarks.peers.arithmetic import normalize_text


class BatchNorm(MLModel):
    """Eval mode."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Normalize."""
        (text,) = payload.inputs[0].data.root
        output = ResponseOutput(
            name="output",
            datatype="BYTES",
            shape=[1, 1],
            data=[normalize_text(text)],
            parameters=Parameters(content_type="base64"),
        )
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main() -> None:
    """Serve on the port that the command line names."""
    port = int(sys.argv[1])
    settings = Settings(
        host="127.0.0.1", http_port=port, grpc_port=0, metrics_endpoint=None, parallel_workers=0, debug=False
    )
    await MLServer(settings).start([ModelSettings(name="bn", implementation=BatchNorm)])


if __name__ == "__main__":
    asyncio.run(main())
