"""The files of deploy/, and what of the service they have to agree with."""

import re
import tomllib
from pathlib import Path

import yaml

from batchnorm_service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".venv-deploy/bin"
"""kubernetes-validate and podman-compose: `make .venv-deploy/tools.stamp`."""

DEFAULTS = Settings.model_construct()
VARIABLES = {PREFIX + name.upper() for name in Settings.model_fields}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
STOPPING_SECONDS = DEFAULTS.shutdown_seconds + DEFAULTS.store_timeout_seconds
"""The longest time from SIGTERM to the exit: calls end, then what is queued is committed."""


def load(path):
    """The documents of a YAML file in deploy/."""
    return [each for each in yaml.safe_load_all((DEPLOY / path).read_text()) if each]


def compose():
    (document,) = load("compose.yaml")
    return document


def image_variables():
    """The environment that the image sets."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    return dict(re.findall(r"\b([A-Z_]+)=(\S+)", " ".join(re.findall(r"^ENV (.*)$", text, re.M)[-1:])))


def accepted(variables, monkeypatch):
    """The settings that the service makes of these variables on top of the image's, or an error."""
    variables = image_variables() | {name: str(value) for name, value in variables.items()}
    ours = {name: value for name, value in variables.items() if name.startswith(PREFIX)}
    assert ours.keys() <= VARIABLES, ours.keys() - VARIABLES
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    return Settings()


def seconds(text):
    """Of a duration such as 45s or 2m."""
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]
