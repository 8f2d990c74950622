"""The targets of fuzzing, by name. A new one is a function that takes bytes, and a row here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import torch

from fuzz import examples
from fuzz.documents import read_document, read_head, read_moments, read_tokens
from fuzz.inference import read_inference
from fuzz.stored import read_record, read_url
from fuzz.streams import answer_stream
from fuzz.tensors import read_json, read_npy, read_safetensors, write

torch.set_num_threads(1)  # as the service does: threads of its own make small batches slow

CORPUS: Final = Path(__file__).parent / "corpus"
"""Inputs that fuzzing found, in a folder for each target: those that reach new code, and those that broke something."""


class Target(NamedTuple):
    """One thing to fuzz.

    Attributes:
        promise: its docstring says what it promises; it raises when that is broken. The input is not empty.
        examples: makes inputs that reach most of it, to start from.
        longest: the longest input in bytes.
    """

    promise: Callable[[bytes], None]
    examples: Callable[[], list[bytes]]
    longest: int = 4096


TARGETS: Final = {
    "json": Target(read_json, examples.json_bodies),
    "npy": Target(read_npy, examples.npy_files),
    "safetensors": Target(read_safetensors, examples.safetensors_files),
    "written": Target(write, examples.tensors, 512),
    "documents": Target(read_document, examples.documents),
    "moments": Target(read_moments, examples.moments),
    "inference": Target(read_inference, examples.inference_requests),
    "heads": Target(read_head, examples.heads, 1024),
    "records": Target(read_record, examples.records),
    "urls": Target(read_url, examples.urls, 256),
    "tokens": Target(read_tokens, examples.token_files, 1024),
    "http": Target(answer_stream, examples.streams),
}


def inputs(name: str) -> Iterator[bytes]:
    """A target's examples, and its corpus in the repository."""
    yield from TARGETS[name].examples()
    yield from (path.read_bytes() for path in sorted((CORPUS / name).iterdir()))
