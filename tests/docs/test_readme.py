"""The README's examples are run as they stand; what they print is what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```sh\n(curl.*?|for .*?|python3.*?)```\n```(\w+)\n(.*?)```", README.read_text(), re.DOTALL)


SNIPPETS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 5
    assert len(SNIPPETS) >= 2


def test_the_python_examples_print_what_the_readme_says(start, capsys: pytest.CaptureFixture[str]) -> None:
    server = start("--store", "memory:")
    namespace: dict[str, object] = {}
    try:
        for code, expected in SNIPPETS:
            exec(code.replace("http://127.0.0.1:8000", server.url), namespace)
            assert capsys.readouterr().out == expected, code
    finally:
        namespace["client"].close()


def test_the_curl_examples_print_what_the_readme_says(start, tmp_path: Path) -> None:
    server = start("--store", "memory:")
    address = server.url.removeprefix("http://")
    for commands, form, expected in EXAMPLES:
        script = commands.replace("127.0.0.1:8000", address).replace("python3", sys.executable)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, commands + done.stderr
        if form == "json":
            assert json.loads(done.stdout) == json.loads(expected), commands
        else:
            assert done.stdout.strip() == expected.strip(), commands


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)[^)]*\)", README.read_text()))
def test_what_the_readme_links_to_exists(target: str) -> None:
    assert (README.parent / target).exists()
