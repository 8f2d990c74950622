"""The Open Inference Protocol (V2), beside the REST interface and over the same layers.

    https://github.com/kserve/open-inference-protocol, with Triton's extensions for binary tensors and statistics

Routes, tokens, limits and errors are those of `rest`, whose problems have the protocol's form below /v2.
"""

from batchnorm_service.open_inference.interface import INTERFACE

__all__ = ["INTERFACE"]
