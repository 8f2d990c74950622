"""The examples of the README and of docs/ are run as they stand; what they print is what the page says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from batchnorm_service.rest.application import ROUTERS

README = Path(__file__).parents[2] / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]


def _examples(page: Path) -> list[tuple[str, str, str]]:
    """Commands, and what they print: its form (json or text) and the text, both empty where the page has none."""
    gateway = r"```sh\n((?:curl|for|\.venv/bin/python) [^`]*)```(?:\n```(\w+)\n(.*?)```)?"
    return re.findall(gateway, page.read_text(), re.DOTALL)


def _refuses(expected: str) -> bool:
    return '"type": "/problems/' in expected


def _links(page: Path) -> list[str]:
    return re.findall(r"\]\((?!https?:)([^)#:]+)[^)]*\)", page.read_text())


def _snippets(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", page.read_text(), re.DOTALL)


SNIPPETS = _snippets(README)


def test_the_readme_has_examples() -> None:
    assert len(_examples(README)) >= 5
    assert len(SNIPPETS) >= 2


def test_the_python_examples_print_what_the_readme_says(start, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice, as by somebody who tries them again later against the same server."""
    server = start("--store", "memory:")
    for _ in range(2):
        namespace: dict[str, Any] = {}
        try:
            for code, expected in SNIPPETS:
                exec(code.replace("http://127.0.0.1:8000", server.url), namespace)
                assert capsys.readouterr().out == expected, code
        finally:
            namespace["client"].close()


TRIED = {"README", "extending"}  # `extending` has a test of its own


@pytest.mark.parametrize(
    "page", [page for page in PAGES if _snippets(page) and page.stem not in TRIED], ids=lambda page: page.stem
)
def test_the_python_examples_of_other_pages(
    page: Path, start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    server = start("--store", "memory:")
    namespace: dict[str, Any] = {}
    try:
        for code, expected in _snippets(page):
            exec(code.replace("http://127.0.0.1:8000", server.url), namespace)
            assert capsys.readouterr().out == expected, code
    finally:
        namespace["client"].close()


@pytest.mark.parametrize("page", [page for page in PAGES if _examples(page)], ids=lambda page: page.stem)
def test_the_curl_examples_print_what_the_page_says(page: Path, start, tmp_path: Path) -> None:
    """And run a second time, when counters have moved on."""
    server = start("--store", "memory:")
    address = server.url.removeprefix("http://")
    examples = _examples(page)
    for number, (commands, form, expected) in enumerate(examples + examples):
        script = commands.replace("127.0.0.1:8000", address).replace(".venv/bin/python", sys.executable)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, commands + done.stderr
        if number >= len(examples):
            assert form != "json" or json.loads(done.stdout).keys() == json.loads(expected).keys(), commands
        elif form == "":
            assert done.stdout, commands
        elif form == "json":
            assert json.loads(done.stdout) == json.loads(expected), commands
        else:
            assert done.stdout.strip() == expected.strip(), commands


@pytest.mark.parametrize("page", [page for page in PAGES if _examples(page)], ids=lambda page: page.stem)
def test_a_failing_example_says_so(page: Path, tmp_path: Path) -> None:
    """`curl -s` was silent when the service was not there, and `-o /dev/null` hid what it answered."""
    for commands, _, expected in _examples(page):
        if not commands.startswith(("curl", "for")):
            continue
        assert "/dev/null" not in commands, commands
        assert commands.count("--fail") == (0 if _refuses(expected) else commands.count("curl ")), commands
        script = commands.replace("127.0.0.1:8000", "127.0.0.1:1")  # nobody listens there
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "curl: (7)" in done.stderr, commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_links_to_exists(page: Path) -> None:
    for target in _links(page):
        assert (page.parent / target).exists(), target


NAMED = [
    named
    for page in ("testing", "reliability", "security")
    for named in re.findall(r"`(tests/[\w/]+(?:\.py)?)(?:::(\w+))?`", (README.parent / f"docs/{page}.md").read_text())
]


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_the_tests_that_the_documentation_names_are_there(path: str, name: str) -> None:
    found = README.parent / path
    assert found.exists()
    assert not name or f"def {name}" in found.read_text()


def test_the_documentation_names_tests() -> None:
    assert len(NAMED) > 80


def test_every_promise_names_a_test() -> None:
    page = (README.parent / "docs/reliability.md").read_text()
    rows = re.findall(r"^\| (.+) \|$", page.partition("## Promises")[2].partition("\n\n**")[0], re.M)[1:]
    assert len(rows) > 10
    for row in rows:
        _, settings, tests = row.split("|")
        assert re.search(r"`tests/\w+", tests), row
        for setting in re.findall(r"`(BATCHNORM_\w+)`", settings):
            assert f"| `{setting}` |" in (README.parent / "docs/settings.md").read_text(), setting


def test_every_answer_to_a_threat_names_a_test() -> None:
    page = (README.parent / "docs/security.md").read_text()
    rows = re.findall(r"^\| (.+) \|$", page.partition("## Threats")[2].partition("\n\n## ")[0], re.M)[1:]
    assert len(rows) > 15
    for row in rows:
        _, answer, _, tests = row.split("|")
        assert answer.startswith(" nothing: ") or re.search(r"`tests/\w+", tests), row


def test_the_readme_lists_every_endpoint() -> None:
    """Seen: history, rollback and pins were missing."""
    table = README.read_text().partition("## Endpoints\n\n")[2].partition("\n\n")[0]
    listed: set[tuple[str, str]] = set()
    for methods, path in re.findall(r"(`[A-Z]+(?:`, `[A-Z]+)*) (/[^`]*)`", table):
        listed |= {(method, path) for method in re.findall(r"[A-Z]+", methods)}
    assert ("PUT", "/v1/layers/{name}/state") in listed
    routes = {
        (method, route.path)
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute) and route.path.startswith("/v1")
        for method in route.methods - {"HEAD"}
    }
    assert {each for each in listed if each[1].startswith("/v1")} == routes
