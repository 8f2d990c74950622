"""Which build of torch is installed, by make and by pip (PIP_EXTRA_INDEX_URL), and in the image (TORCH)."""

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


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_the_image_takes_the_build_that_it_is_told(tmp_path, build):
    """The commands of the Dockerfile up to the packages, with a pip that writes down what it is called with."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", "")
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", text, re.M))
    assert arguments["TORCH"] == "cpu"
    assert re.fullmatch(r"https://\S+/whl/cpu", arguments["PIP_EXTRA_INDEX_URL"])
    commands = [part.split("&& cd")[0] for part in re.findall(r"^RUN (.*requirements|.*-r .*)$", text, re.M)]
    (tmp_path / "pip").write_text('#!/bin/sh\necho "[$PIP_EXTRA_INDEX_URL] $*"\n')
    (tmp_path / "pip").chmod(0o755)
    variables = arguments | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH": build}
    command = ["sh", "-ec", "\n".join(commands)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
    index, install = arguments["PIP_EXTRA_INDEX_URL"], "--python /opt/venv/bin/python install --no-deps"
    torch = (
        f"[{index}] {install} torch=={PINNED}+cpu" if build == "cpu" else f"[] {install} --require-hashes -r torch.txt"
    )
    assert done.stdout.splitlines() == [torch, f"[{index}] {install} --require-hashes -r service.txt"]


def test_the_readme_names_it_for_each_way():
    (section,) = re.findall(r"\*\*Which torch\.\*\*.*?```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    setting, *ways = section.splitlines()
    assert re.fullmatch(r"export PIP_EXTRA_INDEX_URL=https://\S+/whl/cpu", setting)
    assert [way.split()[0] for way in ways] == ["make", "pip", "docker"]
    assert "PIP_EXTRA_INDEX_URL" not in ways[2]  # the image has the CPU build by default
