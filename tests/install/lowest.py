"""Prints the lowest version that pyproject.toml admits of each dependency, as constraints for pip."""

import re
import tomllib
from pathlib import Path


def requirements() -> list[str]:
    """Every dependency that the project names, those of its extras too."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]


def lowest(requirement: str) -> str:
    """`name==version` of `name[extra]>=version,<other`."""
    found = re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?>=([\w.]+)(?:,<[\w.]+)?", requirement)
    if found is None:
        raise ValueError(f"{requirement} has no lower bound")
    return f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    print("\n".join(sorted({lowest(requirement) for requirement in requirements()})))
