"""What pyproject.toml admits, and what constraints.txt installs."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from install.lowest import lowest, requirements

ROOT = Path(__file__).parents[2]


def pins():
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def test_every_dependency_has_a_lower_bound():
    for requirement in requirements():
        name, version = lowest(requirement).split("==")
        assert Requirement(requirement).name == name
        assert Version(version) in Requirement(requirement).specifier


def test_a_dependency_is_bounded_alike_in_every_extra():
    bounds = [lowest(requirement) for requirement in requirements()]
    assert len({bound.split("==")[0] for bound in bounds}) == len(set(bounds))


def test_what_is_used_from_inside_has_an_upper_bound():
    """The fast path is a subclass of uvicorn's protocol: another uvicorn may break it at any time."""
    bounded = {Requirement(each).name for each in requirements() if "<" in each}
    assert {"uvicorn", "httptools", "starlette"} <= bounded


def test_constraints_are_within_the_bounds():
    installed = pins()
    for requirement in map(Requirement, requirements()):
        assert Version(installed[requirement.name]) in requirement.specifier, requirement


def test_what_the_code_imports_is_named():
    """starlette was imported and came along with fastapi: nobody had a say in its version."""
    named = {Requirement(each).name for each in requirements()}
    named.add("pydantic_core")  # pydantic names exactly one version of it
    distributions = packages_distributions()
    for path in [*ROOT.glob("client/**/*.py"), *ROOT.glob("service/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in {name.partition(".")[0] for name in modules} - sys.stdlib_module_names:
                if not module.startswith("batchnorm_"):
                    assert named & set(distributions[module]), f"{path}: {module}"
