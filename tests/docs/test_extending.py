"""The examples of docs/extending.md: added to a copy of the packages, each section's try works as the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/extending.md").read_text(), re.M | re.S))
BLOCKS = re.compile(r"```(python|diff|text)\n(?:# ([\w/]+\.py|try it)\n)?(.*?)```", re.S)

PRELUDE = '''
import asyncio
import httpx
from batchnorm_service.app import create_app
from batchnorm_service.settings import Settings


class Client:
    """Calls to a service without a socket."""

    def __getattr__(self, method):
        return lambda path, **options: runner.run(self._call(method, path, options))

    async def _call(self, method, path, options):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://test") as client:
            return await client.request(method.upper(), path, **options)


gateway = create_app(Settings(store="memory:"))
runner = asyncio.Runner()
lifespan = gateway.app.router.lifespan_context(gateway.app)
runner.run(lifespan.__aenter__())
client = Client()
'''


def test_the_page_has_each_kind_of_extension() -> None:
    assert {"A tensor form", "A store", "An endpoint", "A kind of statistics", "A metric"} <= SECTIONS.keys()


@pytest.mark.parametrize("section", SECTIONS)
def test_an_extension_works_as_the_page_says(section: str, tmp_path: Path) -> None:
    for part in ("client", "service", "tests/store", "tests/simulation", "tests/conftest.py", "pyproject.toml"):
        source, target = ROOT / part, tmp_path / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    script, expected = "", ""
    for kind, name, text in BLOCKS.findall(SECTIONS[section]):
        if name == "try it":
            script = text
        elif kind == "text":
            expected = text
        elif kind == "diff":
            _add_lines(tmp_path / name, text)
        else:
            assert not (tmp_path / name).exists(), f"{name} is not new"
            (tmp_path / name).write_text(text)
    assert script
    assert expected
    prelude = PRELUDE if "client." in script else ""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'client'}:{tmp_path / 'service'}:{tmp_path / 'tests'}"}
    command = [sys.executable, "-c", prelude + script]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith(expected), ran.stdout


def _add_lines(path: Path, change: str) -> None:
    """Add the lines with a plus after those without, which must be there once."""
    lines = change.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] == " ")
    text = path.read_text()
    assert text.count(before) == 1, f"{path.name} has {before!r} {text.count(before)} times"
    path.write_text(text.replace(before, "".join(line[1:] for line in lines)))
