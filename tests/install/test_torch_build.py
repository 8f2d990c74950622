"""PIP_EXTRA_INDEX_URL alone decides which build of torch is installed, by make, by pip and in the image."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def index(folder, version):
    """A package index with a wheel of torch that has nothing in it; its URL."""
    page = folder / "torch"
    page.mkdir(parents=True)
    info, name = f"torch-{version}.dist-info", f"torch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(page / name, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (page / "index.html").write_text(f'<a href="{name}">{name}</a>')
    return folder.as_uri()


def environment(**variables):
    """This process's environment without what is set for pip, or by a `make` above, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE", "MFLAGS"))}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}


@pytest.mark.parametrize("requirement", [f"torch=={PINNED}", "torch>=2.13.0"])
@pytest.mark.parametrize("extra", [False, True])
def test_pip_takes_the_build_for_cpus_from_another_index(tmp_path, requirement, extra):
    public, cpu = index(tmp_path / "public", PINNED), index(tmp_path / "cpu", f"{PINNED}+cpu")
    variables = {"PIP_INDEX_URL": public} | ({"PIP_EXTRA_INDEX_URL": cpu} if extra else {})
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", requirement]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Would install torch-{PINNED}{'+cpu' if extra else ''}\n" in done.stdout


def test_make_hands_the_setting_to_pip(tmp_path):
    """`make run` in an environment whose Python writes down what it is called with."""
    log, python = tmp_path / "log", tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$PIP_EXTRA_INDEX_URL $*" >> {log}\n')
    python.chmod(0o755)
    command = ["make", "--directory", ROOT, f"VENV={tmp_path}", f"{tmp_path}/service.stamp"]
    variables = environment(PIP_EXTRA_INDEX_URL="https://index.example/cpu")
    subprocess.run(command, env=variables, capture_output=True, check=True)
    calls = [line for line in log.read_text().splitlines() if " install " in line]
    assert len([call for call in calls if call.endswith(f"torch=={PINNED}")]) == 1
    assert len(calls) == 3
    for call in calls:
        assert call.startswith("https://index.example/cpu ")
        assert "index-url" not in call
        assert "--isolated" not in call  # pip would not look into the environment


@pytest.mark.parametrize("extra", ["", "https://index.example/cpu"])
def test_the_image_takes_the_setting_when_it_installs_torch(tmp_path, extra):
    """The commands of the Dockerfile up to the packages, with a pip that writes down what it is called with."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    setting, *commands = re.findall(
        r"^(?:ARG|RUN) (.*(?:PIP_EXTRA|requirements|pip install --no-deps -).*)$", text, re.M
    )
    assert setting == 'PIP_EXTRA_INDEX_URL=""'
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "pip").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PIP_EXTRA_INDEX_URL": extra}
    command = ["sh", "-ec", "\n".join(commands)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
    torch = f"torch=={PINNED}" if extra else "--require-hashes -r torch.txt"
    assert done.stdout.splitlines() == [
        f"install --no-deps {torch}",
        "install --no-deps --require-hashes -r service.txt",
    ]


def test_the_readme_names_it_for_each_way():
    (section,) = re.findall(r"\*\*Which torch\.\*\*.*?```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    setting, *ways = section.splitlines()
    assert re.fullmatch(r"export PIP_EXTRA_INDEX_URL=https://\S+/whl/cpu", setting)
    assert [way.split()[0] for way in ways] == ["make", "pip", "docker"]
    assert "--build-arg PIP_EXTRA_INDEX_URL " in ways[2]
