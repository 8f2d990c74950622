"""Media types of bodies."""

from typing import Final

JSON: Final = "application/json"
MERGE_PATCH_JSON: Final = "application/merge-patch+json"
NPY: Final = "application/x-npy"
SAFETENSORS: Final = "application/vnd.safetensors"
TEXT: Final = "text/plain"
PROBLEM_JSON: Final = "application/problem+json"
