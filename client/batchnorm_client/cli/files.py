"""Commands that copy a layer's tensors to a safetensors file and back: export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from batchnorm_client.cli.data import written
from batchnorm_client.cli.output import Json, print_document, print_json, say
from batchnorm_client.cli.service import USAGE, At, Expect, IfMatch, Name, Service, calling, fail, size, with_service
from batchnorm_client.wire.errors import ProblemError
from batchnorm_client.wire.tensors import Tensor, decode_safetensors, encode_safetensors, itemsize

_CONFIG = "batchnorm.config"
"""The metadata entry with the config, from which `import --create` creates the same layer."""


@with_service
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="The output file; replaced if it exists.")],
    at: At = None,
    expect: Expect = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Write a layer's tensors to a safetensors file, named as in torch's `state_dict()`."""
    with calling(service) as client:
        layer = client.layer(name, at=at, expect=expect)
        config = layer.inspect().config
        tensors = {key: Tensor.of(array) for key, array in layer.state_dict().items()}
        wide_first = dict(sorted(tensors.items(), key=lambda item: -itemsize(item[1].dtype)))
        metadata = {"format": "pt", _CONFIG: config.model_dump_json(exclude_defaults=True, exclude={"device"})}
        with written(file) as part, part.open("wb") as opened:
            opened.writelines(encode_safetensors(wide_first, metadata))
    if json:
        print_json({"name": name, "file": str(file), "tensors": {key: tensors[key].shape for key in tensors}})
    else:
        say(name, f"{', '.join(tensors)} written to {file}")


@with_service
def import_(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="From export, or a saved state_dict.")],
    create: Annotated[
        bool, typer.Option("--create", help="Create the layer first, with the file's config.", show_default=False)
    ] = False,
    if_match: IfMatch = None,
    *,
    service: Service,
    json: Json = False,
) -> None:
    """Replace a layer's tensors by those of a safetensors file. Tensors that are not in the file are kept."""
    try:
        tensors, metadata = decode_safetensors(bytearray(file.read_bytes()))
        options = _config(tensors, metadata) if create else {}
    except OSError as error:
        fail(f"{file}: {error.strerror or error}", USAGE)
    except ProblemError as error:
        fail(f"{file}: not a safetensors file, or a damaged one: {error}", USAGE)
    except ValueError as error:
        fail(f"{file}: {error}", USAGE)
    with calling(service) as client:
        layer = client.create_layer(name, **options) if create else client.layer(name)
        document = layer.load_state_dict(tensors, if_match=if_match)
    if json:
        print_document(document)
    else:
        say(name, f"{', '.join(tensors)} read from {file}; {size(document)}")


def _config(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Any:
    """The config of a layer for these tensors: that of the file, or torch's defaults."""
    if _CONFIG in metadata:
        config: dict[str, Any] = orjson.loads(metadata[_CONFIG])
        return config
    some = next((tensor for tensor in tensors.values() if len(tensor.shape) == 1), None)
    if some is None:
        raise ValueError("no one-dimensional tensor in it, so the number of channels is unknown")
    return {
        "num_features": some.shape[0],
        "affine": "weight" in tensors,
        "track_running_stats": "running_mean" in tensors,
        "dtype": "float64" if some.dtype == "float64" else "float32",
    }
