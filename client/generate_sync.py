"""Generates the synchronous client from the asynchronous one: `python client/generate_sync.py [--check]`.

`async_*.py` are written by hand; the files without `async_` in their names are generated from them by replacing words,
also in docstrings. `unasync` keeps file names and leaves docstrings alone, which are most of these files.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).with_name("batchnorm_client")
FILES = {
    "async_client.py": "client.py",
    "async_follower.py": "follower.py",
    "async_layer.py": "layer.py",
    "transport/async_connections.py": "transport/connections.py",
}

WORDS = {
    r"(?<!\w)\(await ([\w.]+\([^()]*\))\)": r"\1",
    r"\bawait ": "",
    r"\basync (def|with|for)\b": r"\1",
    r"\bAsyncRuntime\b": "SyncRuntime",
    r"\bAsync(?=[A-Z])": "",
    r"\basync_(client|connections|follower|layer)\b": r"\1",
    r"__a(enter|exit)__": r"__\1__",
    r"\baclose\b": "close",
    r"\baiter_bytes\b": "iter_bytes",
    r"\bhandle_async_request\b": "handle_request",
    r"\basync_transport\b": "sync_transport",
    r"for (\w+) in (.+):\n +yield \1\n": r"yield from \2\n",
    r"  # noqa: ASYNC109.*": "",
    r"Awaitable\[None\]": "None",
    r"\bAwaitable, ": "",
}
"""Regular expressions and their replacements, for code."""

SENTENCES = {
    "The asynchronous client.": "The synchronous client.",
    "An asynchronous client of a batch-normalization service. An async context manager.": (
        "A client of a batch-normalization service. A context manager; threads may share it."
    ),
    "\n    The child runs an event loop of its own.": "",
    "The deadline applies to it, too.\n": """Its timeouts apply to each read
            separately, so headers that arrive byte by byte may take longer than the deadline.
""",
    "\n        The arithmetic runs in a thread.\n": "",
    "An async context manager.\n\n    A background task": (
        "A context manager; threads may share it.\n\n    A background thread"
    ),
    "`async with`": "`with`",
    "async with await client": "with client",
    "locks and tasks.": "locks and threads.",
    "Connections of `AsyncClient`.": "Connections of `Client`; threads may share them.",
    """            # An HTTP client that was passed in has its own sockets, which do not check the deadline.
""": "",
    "                nullcontext() if given is None else anyio.move_on_after(attempts.left()),\n": "",
    "        raise attempts.timed_out()\n": "",
}
"""Text that differs between the two clients, and its replacement."""


def sync_text(source: str) -> str:
    """The source of the synchronous client's file."""
    text = (PACKAGE / source).read_text()
    for sentence, replacement in SENTENCES.items():
        text = text.replace(sentence, replacement)
    for pattern, replacement in WORDS.items():
        text = re.sub(pattern, replacement, text)
    note = f"# Generated from {source} by generate_sync.py (make sync-client): change that file, not this one.\n"
    return formatted(note + text, FILES[source])


def formatted(text: str, name: str) -> str:
    """The text with sorted imports, formatted like all other files."""
    for command in (["check", "--quiet", "--select=I,F401", "--fix"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, f"--stdin-filename={PACKAGE / name}", "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return text


def main() -> None:
    """Write the files; with `--check`, only exit with status 1 if one of them is out of date."""
    sources = "".join((PACKAGE / source).read_text() for source in FILES)
    if unused := [sentence for sentence in SENTENCES if sentence not in sources]:
        sys.exit(f"no source contains {unused[0]!r} any more")
    for source, target in FILES.items():
        text, path = sync_text(source), PACKAGE / target
        if "--check" not in sys.argv:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path} is out of date with {source}: run make sync-client")


if __name__ == "__main__":
    main()
