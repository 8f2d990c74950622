"""What the application needs of this package."""

from __future__ import annotations

from typing import Final

from batchnorm_service.layers import Layers
from batchnorm_service.rest import ApiOptions
from batchnorm_service.rest.interface import Interface
from batchnorm_service.rest.layer_request import Endpoint
from batchnorm_service.rest.target import MODEL, MODEL_VERSION

from .documents import IndexRequest, InferenceError, InferenceRequest, InferenceResponse
from .infer import InferEndpoint
from .infer import router as infer_routes
from .models import router as model_routes
from .server import router as server_routes
from .statistics import Statistics
from .statistics import router as statistics_routes


def _endpoints(layers: Layers, options: ApiOptions) -> dict[tuple[str, str], Endpoint]:
    statistics = Statistics(layers)
    infer = InferEndpoint(layers, statistics, options.max_body_bytes, options.max_elements).infer
    return {
        ("POST", f"{MODEL}/infer"): infer,
        ("POST", f"{MODEL_VERSION}/infer"): infer,
        ("GET", f"{MODEL}/stats"): statistics.read,
    }


INTERFACE: Final = Interface(
    routers=(server_routes, model_routes, infer_routes, statistics_routes),
    models=(IndexRequest, InferenceError, InferenceRequest, InferenceResponse),
    endpoints=_endpoints,
)
