"""Writes the client that blocks from the one that does not: `python client/generate_sync.py [--check]`.

`async_*.py` are written by hand; `client.py`, `layer.py` and `connections.py` come from them word by word, with their
docstrings. Not by `unasync`: it keeps files' names and leaves docstrings alone, which are most of these files.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).with_name("batchnorm_client")
FILES = {
    "async_client.py": "client.py",
    "async_layer.py": "layer.py",
    "transport/async_connections.py": "transport/connections.py",
}

WORDS = {
    r"(?<!\w)\(await ([\w.]+\([^()]*\))\)": r"\1",
    r"\bawait ": "",
    r"\basync (def|with|for)\b": r"\1",
    r"\bAsyncRuntime\b": "SyncRuntime",
    r"\bAsync(?=[A-Z])": "",
    r"\basync_(client|connections|layer)\b": r"\1",
    r"__a(enter|exit)__": r"__\1__",
    r"\baclose\b": "close",
    r"\baiter_bytes\b": "iter_bytes",
    r"\bhandle_async_request\b": "handle_request",
    r"\basync_transport\b": "sync_transport",
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
    "Sending calls without blocking.": "Sending calls, for those who may block.",
    "client that does not block.\n": "client that blocks; threads may share them.\n",
    """            # An HTTP client that was passed in has sockets of its own, which look at no deadline.
""": "",
    ", nullcontext() if given is None else anyio.move_on_after(attempts.left())": "",
    "        raise attempts.timed_out()\n": "",
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
    for command in (["check", "--quiet", "--select=I,F401", "--fix"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, f"--stdin-filename={PACKAGE / name}", "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return text


def main() -> None:
    """Write the files, or with `--check` end with status 1 if one of them is out of date."""
    sources = "".join((PACKAGE / source).read_text() for source in FILES)
    if unused := [sentence for sentence in SENTENCES if sentence not in sources]:
        sys.exit(f"no source says {unused[0]!r} any more")
    for source, target in FILES.items():
        text, path = sync_text(source), PACKAGE / target
        if "--check" not in sys.argv:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path} is not what {source} makes: run make sync-client")


if __name__ == "__main__":
    main()
