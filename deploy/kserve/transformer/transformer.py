"""A transformer of KServe that normalizes the input of a predictor with a layer of the batch-normalization service.

Between the user's request and the predictor's, one call: `POST /v2/models/<layer>/infer` with the batch as bytes.
"""

import argparse
import os

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, Model, ModelServer, model_server
from kserve.errors import InvalidInput
from kserve.inference_client import RESTConfig

TYPES = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}


class Normalizer(Model):
    """Normalizes one input and hands the request on.

    Args:
        name: of the model, as the user and the predictor call it.
        url: of the service.
        layer: that normalizes.
        at: the version or tag of a kept state; None for the newest.
        of: the name of the input; None for the first.
        datatype: that the layer takes. Other numbers are converted to it.
    """

    def __init__(self, name: str, url: str, layer: str, at: str | None, of: str | None, datatype: str) -> None:
        super().__init__(name)
        self._url, self._layer, self._of, self._datatype = url, layer, of, datatype
        self._parameters = {"binary_data_output": True} | ({} if at is None else {"at": at})
        self._client = InferenceRESTClient(RESTConfig(protocol="v2", retries=3))

    async def preprocess(self, payload: dict | InferRequest, headers: dict[str, str] | None = None) -> InferRequest:
        """The request with the normalized batch.

        Raises:
            InvalidInput: it is not of protocol V2, there is no such input, or the service refused the batch.
        """
        if not isinstance(payload, InferRequest):
            raise InvalidInput(f"call /v2/models/{self.name}/infer: a layer takes tensors of protocol V2")
        names = [each.name for each in payload.inputs]
        if self._of is not None and self._of not in names:
            raise InvalidInput(f"there must be an input {self._of!r}, got {names}")
        index = 0 if self._of is None else names.index(self._of)
        array = await self._normalize(payload.inputs[index].as_numpy(), (headers or {}).get("x-request-id"))
        payload.inputs[index] = self._tensor(names[index], array)
        return payload

    async def _normalize(self, batch: np.ndarray, request_id: str | None) -> np.ndarray:
        given = self._tensor("input", batch.astype(TYPES[self._datatype]))
        headers = {"X-Request-ID": request_id} if request_id else {}
        if token := os.environ.get("BATCHNORM_CLIENT_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        request = InferRequest(self._layer, [given], parameters=dict(self._parameters))
        try:
            answer = await self._client.infer(self._url, request, headers=headers, model_name=self._layer)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in {400, 413, 422}:  # of the caller's making; others become 500
                raise InvalidInput(f"layer {self._layer}: {error.response.text}") from error
            raise
        return answer.outputs[0].as_numpy()

    def _tensor(self, name: str, array: np.ndarray) -> InferInput:
        tensor = InferInput(name, list(array.shape), self._datatype)
        tensor.set_data_from_numpy(array)
        return tensor


def main() -> None:
    """Serve until SIGTERM. KServe adds arguments of its own."""
    parser = argparse.ArgumentParser(
        parents=[model_server.parser], epilog="BATCHNORM_CLIENT_TOKEN in the environment is the token for the service."
    )
    parser.add_argument("--url", required=True, help="of the batch-normalization service")
    parser.add_argument("--layer", required=True, help="that normalizes")
    parser.add_argument("--at", help="version or tag of a kept state; by default the newest is used")
    parser.add_argument("--input", help="name of the input; by default the first")
    parser.add_argument("--datatype", choices=TYPES, default="FP32", help="that the layer takes")
    told = parser.parse_args()
    model = Normalizer(told.model_name, told.url, told.layer, told.at, told.input, told.datatype)
    model.load()
    ModelServer().start([model])


if __name__ == "__main__":
    main()
