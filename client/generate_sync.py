"""Writes the client that blocks from the one that does not: `python client/generate_sync.py [--check]`.

`async_client.py` and `async_layer.py` are written by hand; `client.py` and `layer.py` come from them word by word, with
their docstrings. Not by `unasync`: it keeps files' names and leaves docstrings alone, which are most of these files.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).with_name("batchnorm_client")
FILES = {"async_client.py": "client.py", "async_layer.py": "layer.py"}

WORDS = {
    r"(?<!\w)\(await ([\w.]+\([^()]*\))\)": r"\1",
    r"\bawait ": "",
    r"\basync (def|with|for)\b": r"\1",
    r"\bAsyncRuntime\b": "SyncRuntime",
    r"\bAsync(?=[A-Z])": "",
    r"\basync_(client|layer)\b": r"\1",
    r"__a(enter|exit)__": r"__\1__",
    r"\baclose\b": "close",
    r"for (\w+) in (.+):\n +yield \1\n": r"yield from \2\n",
    r"  # noqa: ASYNC109.*": "",
}
"""What is written in another way, as regular expressions."""

SENTENCES = {
    "The client that does not block.": "The client that blocks.",
    "callers that do not block.": "callers that may block.",
    "Python that does not block. An async context manager.": "Python. A context manager; may be shared by threads.",
    "\n    The child runs an event loop of its own.": "",
    """The deadline bounds it, too. Without it connections
            are made here, from the options below.""": """Its timeouts bound each read by itself: of an answer's
            headers that come byte by byte it waits for all, also beyond the deadline. Without it connections are made
            here, from the options below.""",
    "\n        The arithmetic runs in a thread.\n": "",
}
"""What is true of one client only."""


def sync_text(source: str) -> str:
    """The blocking client's source."""
    text = (PACKAGE / source).read_text()
    for sentence, replacement in SENTENCES.items():
        text = text.replace(sentence, replacement)
    for pattern, replacement in WORDS.items():
        text = re.sub(pattern, replacement, text)
    note = f"# Generated from {source} by generate_sync.py (make sync-client): change that file, not this one.\n"
    return formatted(note + text, FILES[source])


def formatted(text: str, name: str) -> str:
    """The text with imports in order, laid out as all other files."""
    for command in (["check", "--quiet", "--select=I", "--fix"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, f"--stdin-filename={PACKAGE / name}", "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return text


def main() -> None:
    """Write the files, or with `--check` end with status 1 if one of them is out of date."""
    for source, target in FILES.items():
        text, path = sync_text(source), PACKAGE / target
        if "--check" not in sys.argv:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path} is not what {source} makes: run make sync-client")


if __name__ == "__main__":
    main()
