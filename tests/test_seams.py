"""Time, chance and concurrency come through a runtime, so that a simulation can own them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["service/batchnorm_service/layers", "service/batchnorm_service/store"]
MODULES = {"random", "secrets", "time", "uuid"}
"""Nothing of these is used there."""
CALLS = {
    "asyncio.create_task",
    "asyncio.ensure_future",
    "asyncio.sleep",
    "asyncio.timeout",
    "asyncio.to_thread",
    "asyncio.wait_for",
    "datetime.now",
    "datetime.utcnow",
    "os.urandom",
    "queue.SimpleQueue",
    "SimpleQueue",
    "threading.Thread",
    "threading.Timer",
}
METHODS = {"call_at", "call_later", "create_task", "run_in_executor", "time"}
"""Not of an event loop that was asked for."""


def raw_calls(source: str) -> Iterator[tuple[int, str]]:
    """Lines that go past the runtime, and what they call or import."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield node.lineno, node.module
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text in CALLS or (node.attr in METHODS and "get_running_loop" in text):
                yield node.lineno, text


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_goes_past_the_runtime(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [f"{file.relative_to(ROOT)}:{line}: {what}" for file in files for line, what in raw_calls(file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from random import choice",
        "asyncio.sleep(1)",
        "asyncio.get_running_loop().time()",
        "now = asyncio.get_running_loop().time",
        "asyncio.get_running_loop().run_in_executor(None, f)",
        "threading.Thread(target=f)",
        "datetime.now(UTC)",
    ],
)
def test_what_goes_past_it_is_found(source: str) -> None:
    assert list(raw_calls(source))
