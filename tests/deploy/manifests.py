"""The kustomizations of deploy/kubernetes/: as kubectl renders them, and their files one by one."""

import functools
import shutil
import subprocess

import pytest
import yaml

from .files import DEPLOY

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("single", "replicas", "gpu")
FOLDERS = sorted(path.parent.name for path in KUBERNETES.glob("*/kustomization.yaml"))
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")


@functools.cache
def rendered_text(folder):
    command = ["kubectl", "kustomize", KUBERNETES / folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return done.stdout


def rendered(folder):
    """The objects of an overlay by kind and name."""
    objects = [each for each in yaml.safe_load_all(rendered_text(folder)) if each]
    by_name = {identity(each): each for each in objects}
    assert len(by_name) == len(objects)
    return by_name


def documents(path):
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def identity(document):
    return document["kind"], document["metadata"]["name"]


def kustomization(folder):
    (document,) = documents(KUBERNETES / folder / "kustomization.yaml")
    return document


def resources(folder):
    """The objects that a folder's patches may change, and its own, by kind and name."""
    found = {}
    for name in kustomization(folder)["resources"]:
        path = (KUBERNETES / folder / name).resolve()
        more = resources(path.name) if path.is_dir() else {identity(each): each for each in documents(path)}
        assert not found.keys() & more.keys()
        found |= more
    return found


def pods(objects):
    """The pod templates, with their labels."""
    return [each["spec"]["template"] for each in objects if "template" in each.get("spec", {})]
