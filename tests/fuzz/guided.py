"""`python -m fuzz.guided TARGET SECONDS FOLDER`: one target by libFuzzer, guided by coverage; `fuzz.run` starts it."""

from __future__ import annotations

import operator
import sys
from pathlib import Path
from typing import Any

import atheris
import numpy as np
import torch
from atheris.version_dependent import CMP_OP_SHIFT_AMOUNT

from fuzz.limits import MEBIBYTES, SECONDS, file_name, limited
from fuzz.mutate import TOKENS

with atheris.instrument_imports(include=["batchnorm_client", "batchnorm_service"]):
    from fuzz.targets import TARGETS, inputs

_ARRAYS = (np.ndarray, np.generic, torch.Tensor)
_COMPARE = (operator.lt, operator.le, operator.eq, operator.ne, operator.gt, operator.ge)


def _release_arrays() -> None:
    """Compare arrays without atheris.

    Its hook of comparisons (3.0.0) never releases their results. That of an array is an array: 64 KiB are lost each
    time that 64 KiB are compared with a number, and a target that does so would grow until it is over its limit.
    """
    traced = atheris._trace_cmp

    def trace(left: Any, right: Any, opcode: int, counter: int, constant: bool) -> Any:
        if isinstance(left, _ARRAYS) or isinstance(right, _ARRAYS):
            return _COMPARE[opcode >> CMP_OP_SHIFT_AMOUNT](left, right)
        return traced(left, right, opcode, counter, constant)

    atheris._trace_cmp = trace


def main() -> None:
    """Fuzz until the time is over or an input breaks its promise; libFuzzer ends this process."""
    name, seconds, found = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    corpus, seeds, faults = (found / kind / name for kind in ("corpus", "seeds", "faults"))
    seeds.mkdir(parents=True, exist_ok=True)
    for data in inputs(name):
        (seeds / file_name(data)).write_bytes(data)
    words = found / f"words-{name}"
    words.write_text("".join('"{}"\n'.format("".join(f"\\x{byte:02x}" for byte in word)) for word in TOKENS))
    options = {
        "max_total_time": max(1, round(seconds)),
        "timeout": SECONDS,
        "rss_limit_mb": MEBIBYTES,
        "max_len": TARGETS[name].longest,
        "artifact_prefix": f"{faults}/",
        "print_final_stats": 1,
        "dict": words,
    }
    run = limited(TARGETS[name].promise, faults)

    def one(data: bytes) -> None:
        if atheris._trace_cmp.__name__ == "_trace_cmp":  # `Fuzz` sets it
            _release_arrays()
        run(data)

    atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(corpus), str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
