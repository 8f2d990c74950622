"""Layers as models: metadata and readiness."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import Path

from batchnorm_client.wire.documents import LayerConfig
from batchnorm_client.wire.names import STATE_PATTERN
from batchnorm_service.layers import Layers
from batchnorm_service.rest.openapi import describe_responses
from batchnorm_service.rest.routes import READ, LayerName, LayersDependency, document_router
from batchnorm_service.rest.target import MODEL, MODEL_VERSION

from .documents import DATATYPES, INPUT, OUTPUT, ModelMetadata, ModelReady, TensorMetadata

PLATFORM: Final = "pytorch_batchnorm"

Version = Annotated[
    str,
    Path(
        pattern=f"^({STATE_PATTERN.pattern})$",
        max_length=200,
        description="a kept version, or the tag of a pin",
    ),
]

router = document_router("open inference protocol")


def state_of(version: int | str | None) -> int | str | None:
    """The version or the tag that a path or a parameter names; None for the newest state."""
    return int(version) if isinstance(version, str) and version.isdecimal() else version


def model_shape(config: LayerConfig) -> list[int]:
    """The shape of a batch: -1 for any size, and the channels' number. Of several ranks it is the smallest."""
    shape = [-1] * config.smallest_rank
    shape[config.channel_axis] = config.num_features
    return shape


@router.get(
    MODEL,
    dependencies=[READ],
    summary="A layer's metadata",
    responses=describe_responses("The metadata", problems=("layer-not-found",)),
)
async def model_metadata(name: LayerName, layers: LayersDependency) -> ModelMetadata:
    """Batches may also be FP16 and BF16 where it says FP32, and have more dimensions if the layer's config allows."""
    return await _metadata(layers, name, None)


@router.get(
    MODEL_VERSION,
    dependencies=[READ],
    summary="The metadata of a kept state",
    responses=describe_responses("The metadata", problems=("layer-not-found", "version-not-found")),
)
async def model_version_metadata(name: LayerName, version: Version, layers: LayersDependency) -> ModelMetadata:
    """As the layer's."""
    return await _metadata(layers, name, state_of(version))


@router.get(
    f"{MODEL}/ready",
    dependencies=[READ],
    summary="A layer exists",
    responses=describe_responses("It does", problems=("layer-not-found",)),
)
async def model_ready(name: LayerName, layers: LayersDependency) -> ModelReady:
    """And the store can be reached."""
    await layers.get(name)
    return ModelReady(name=name)


@router.get(
    f"{MODEL_VERSION}/ready",
    dependencies=[READ],
    summary="A state of a layer is kept",
    responses=describe_responses("It is", problems=("layer-not-found", "version-not-found")),
)
async def model_version_ready(name: LayerName, version: Version, layers: LayersDependency) -> ModelReady:
    """As of the layer."""
    await layers.get(name, state_of(version))
    return ModelReady(name=name)


async def _metadata(layers: Layers, name: str, at: int | str | None) -> ModelMetadata:
    config = (await layers.get(name, at)).config
    versions, tags = await layers.history.names(name)
    shape, datatype = model_shape(config), DATATYPES[config.dtype]
    return ModelMetadata.model_construct(
        name=name,
        versions=[*map(str, versions), *tags],
        platform=PLATFORM,
        inputs=[TensorMetadata.model_construct(name=INPUT, datatype=datatype, shape=shape)],
        outputs=[TensorMetadata.model_construct(name=OUTPUT, datatype=datatype, shape=shape)],
    )
