"""`python -m fuzz.keep`: the inputs in `.fuzz/corpus` that reach lines of the project which the repository's do not.

Short ones first, so that the corpus stays small; each is copied to `tests/fuzz/corpus`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from fuzz.limits import file_name
from fuzz.run import FOUND, ROOT
from fuzz.targets import CORPUS, TARGETS, inputs

PACKAGES = (str(ROOT / "client"), str(ROOT / "service"))


def lines_of(promise: Callable[[bytes], None], data: bytes) -> set[tuple[str, int, int]]:
    """The steps from line to line within the project's packages that an input takes."""
    steps: set[tuple[str, int, int]] = set()

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        file, last = frame.f_code.co_filename, frame.f_lineno
        if not file.startswith(PACKAGES):
            return None

        def local(inner: FrameType, event: str, _argument: Any) -> Any:
            nonlocal last
            if event == "line":
                steps.add((file, last, inner.f_lineno))
                last = inner.f_lineno
            return local

        return local

    sys.settrace(trace)
    try:
        promise(data)
    finally:
        sys.settrace(None)
    return steps


def keep(name: str) -> int:
    """Copy what reaches more. Returns how many were copied."""
    promise, reached, copied = TARGETS[name].promise, set(), 0
    for data in inputs(name):
        reached |= lines_of(promise, data)
    found = sorted((path.read_bytes() for path in (FOUND / "corpus" / name).iterdir()), key=len)
    for data in filter(None, found):
        steps = lines_of(promise, data)
        if not steps <= reached:
            reached |= steps
            (CORPUS / name / file_name(data)).write_bytes(data)
            copied += 1
    return copied


if __name__ == "__main__":
    for each in sys.argv[1:] or TARGETS:
        print(f"{each:12} {keep(each)} kept", flush=True)
