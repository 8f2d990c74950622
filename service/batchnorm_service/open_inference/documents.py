"""The JSON objects of the Open Inference Protocol: https://github.com/kserve/open-inference-protocol.

Unknown fields and parameters are refused. Parameters that clients send of their own accord, and that mean nothing for a
layer, are accepted and ignored: `priority`, `timeout`, `content_type` and those of sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field, StrictInt, StrictStr

from batchnorm_client.wire.documents import Document
from batchnorm_client.wire.tensors.tensor import MAX_RANK

INPUT: Final = "input"
OUTPUT: Final = "output"

DTYPES: Final[Mapping[str, str]] = MappingProxyType(
    {"FP16": "float16", "BF16": "bfloat16", "FP32": "float32", "FP64": "float64"}
)
"""The protocol's names of data types, and torch's."""

DATATYPES: Final[Mapping[str, str]] = MappingProxyType({dtype: datatype for datatype, dtype in DTYPES.items()})

Datatype = Literal["FP16", "BF16", "FP32", "FP64"]
Dimension = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=0, description="bytes of this tensor after the JSON object")]


class InputParameters(Document):
    """Parameters of an input tensor."""

    binary_data_size: Size | None = None
    content_type: StrictStr | None = Field(None, description="ignored")


class RequestInput(Document):
    """The batch: with `data`, or with `binary_data_size` and its bytes after the JSON object."""

    name: Literal["input"]
    shape: list[Dimension] = Field(max_length=MAX_RANK)
    datatype: Datatype
    parameters: InputParameters = InputParameters()
    data: Any = Field(
        None,
        description="numbers in nested lists as the shape says, or in one list; NaN, Infinity and -Infinity as strings",
        json_schema_extra={"type": "array", "items": {}},
    )


class OutputParameters(Document):
    """Parameters of a requested output."""

    binary_data: bool | None = Field(None, description="whether its numbers are sent as bytes after the JSON object")
    content_type: StrictStr | None = Field(None, description="ignored")


class RequestOutput(Document):
    """An output that is requested; there is one."""

    name: Literal["output"]
    parameters: OutputParameters = OutputParameters()


class RequestParameters(Document):
    """What to do, and with which state."""

    mode: Literal["eval", "train"] = Field(
        "eval", description="train: normalize with the batch's statistics, and fold them into the running ones"
    )
    at: StrictInt | StrictStr | None = Field(
        None, description="eval with a kept state instead of the newest: its version, or the tag of a pin"
    )
    binary_data_output: bool = Field(False, description="whether outputs are sent as bytes after the JSON object")
    sequence_id: StrictInt | StrictStr | None = Field(None, description="ignored, as what follows")
    sequence_start: bool | None = None
    sequence_end: bool | None = None
    priority: int | None = None
    timeout: int | None = None
    content_type: StrictStr | None = None


class InferenceRequest(Document):
    """The JSON object of an inference request."""

    id: str | None = Field(None, description="returned in the response")
    model_name: str | None = Field(None, description="ignored: the path names the layer")
    parameters: RequestParameters = RequestParameters()
    inputs: list[RequestInput] = Field(min_length=1, max_length=1)
    outputs: list[RequestOutput] | None = Field(None, max_length=1)


class ResponseTensor(Document):
    """The normalized batch, with `data` or `binary_data_size`."""

    name: Literal["output"]
    shape: list[Dimension]
    datatype: Datatype
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(None, description="one list of numbers, in C order")


class ResponseParameters(Document):
    """What V1 has in headers."""

    num_batches_tracked: int
    idempotent_replay: Literal[True] | None = Field(None, description="the Idempotency-Key had been used before")


class InferenceResponse(Document):
    """The JSON object of an inference response."""

    model_name: str
    model_version: str = Field(description="of the state that was used; in train mode, after the commit")
    id: str | None = None
    parameters: ResponseParameters
    outputs: list[ResponseTensor]


class InferenceError(Document):
    """Why a request was refused."""

    error: str


class ServerMetadata(Document):
    """What this server is."""

    name: str
    version: str
    extensions: list[str]


class Live(Document):
    """The process is alive."""

    live: Literal[True] = True


class Ready(Live):
    """The store can be reached."""

    ready: Literal[True] = True


class ModelReady(Document):
    """A layer exists, and a state of it is kept."""

    name: str
    ready: Literal[True] = True


class TensorMetadata(Document):
    """The tensor that a layer takes or returns; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Document):
    """What a layer is."""

    name: str
    versions: list[str] = Field(description="the newest, those that are kept, newest first, and the tags of pins")
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class IndexRequest(Document):
    """Which layers to list."""

    ready: bool = Field(False, description="only those that are ready: all are")


class IndexEntry(BaseModel):
    """A layer in the index."""

    name: str
    version: str
    state: Literal["READY"]
    reason: Literal[""]


class Duration(Document):
    """How often something happened, and how long it took in all."""

    count: int
    ns: int


class InferenceStatistics(Document):
    """Inference requests on a layer, by outcome and stage."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class ModelStatistics(Document):
    """Inference requests on a layer."""

    name: str
    version: str
    last_inference: int = Field(description="milliseconds since 1970; 0 if there was none")
    inference_count: int = Field(description="rows of all batches")
    execution_count: int
    inference_stats: InferenceStatistics
    response_stats: dict[str, Any]
    batch_stats: list[Any]
    memory_usage: list[Any]


class StatisticsResponse(Document):
    """The statistics of one layer."""

    model_stats: list[ModelStatistics]
