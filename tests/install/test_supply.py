"""The locks with hashes, the licences, and the workflows that call make."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from install.test_dependencies import pins

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
PYTHONS = ("3.11.9", "3.12.9", "3.13.9")


def locked(name, python="3.11.9"):
    """The versions in a lock that apply on Linux, and how many hashes each has."""
    environment = LINUX | {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    text = (ROOT / f"requirements/{name}.txt").read_text()
    found = {}
    for line, hashes in re.findall(r"^([a-z0-9].*?) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            ((operator, version),) = [(each.operator, each.version) for each in requirement.specifier]
            assert operator == "=="
            found[requirement.name] = (version, hashes.count("sha256:"))
    assert len(found) > 10
    return found


def needed(*extras):
    """What pyproject.toml names, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("name", "extras"), [("service", ["service", "otel"]), ("dev", ["service", "otel", "torch", "demo", "dev"])]
)
def test_a_lock_has_what_the_project_asks_for(name, extras, python):
    """After a change of pyproject.toml or constraints.txt: make lock."""
    versions = locked(name, python) | {"torch": (pins()["torch"], 0)}
    for requirement in map(Requirement, needed(*extras)):
        version, _ = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


@pytest.mark.parametrize("name", ["service", "dev", "torch"])
def test_a_lock_has_the_versions_of_the_constraints(name):
    constraints = {canonicalize_name(package): version for package, version in pins().items()}
    for package, (version, _) in locked(name).items():
        if name != "torch" or package in constraints:  # constraints.txt goes with any build of torch
            assert version == constraints[package], package
    assert ("torch" in locked(name)) == (name == "torch")


def test_the_lock_of_the_service_is_part_of_the_others():
    assert locked("service").items() <= locked("dev").items()
    cuda = re.findall(r"^[a-z]\S+", (ROOT / "requirements/cuda.txt").read_text(), re.M)
    assert {*cuda} <= locked("torch").keys()
    assert not {*cuda} & locked("dev").keys()


def test_locks_name_no_index():
    for lock in (ROOT / "requirements").iterdir():
        assert not re.search(r"://|index|find-links|--trusted", lock.read_text()), lock


def test_every_package_has_a_licence():
    rows = re.findall(r"^\| (\S+) +\| (\S+) +\| (.+?) +\|$", (ROOT / "docs/licences.md").read_text(), re.M)[
        1:
    ]  # without the heading
    listed = {canonicalize_name(name): version for name, version, _ in rows}
    service = {name: version for name, (version, _) in locked("service").items()}
    assert listed == service | {"torch": pins()["torch"]}
    assert [name for name, _, licence in rows if licence == "UNKNOWN"] == ["pysimdjson"]


def targets():
    return {*re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M)}


def test_there_are_workflows():
    assert [workflow.stem for workflow in WORKFLOWS] == ["image", "release", "test"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_a_workflow_calls_make_targets_that_exist(workflow):
    document = yaml.safe_load(workflow.read_text())
    assert document["permissions"] == {"contents": "read"}
    steps = [step for job in document["jobs"].values() for step in job["steps"]]
    called = [step["run"].split()[1:] for step in steps if step.get("run", "").startswith("make ")]
    assert called
    for words in called:
        assert {word for word in words if "=" not in word} <= targets(), words
    for step in steps:
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", step["uses"])
        else:
            assert "${{" not in step["run"], "an expression in a command may inject another"
    assert all("timeout-minutes" in job for job in document["jobs"].values())
