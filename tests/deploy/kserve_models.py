"""Compares manifests with the models of KServe's and Kubernetes' Python packages: run in an environment that has them.

Arguments: files. Prints, as JSON, each field that they do not know, or whose value has another type.
"""

import json
import re
import sys
from pathlib import Path

import yaml
from kserve import models as kserve_models
from kubernetes.client import models as kubernetes_models

PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}


def problems(value, kind, where):
    if match := re.fullmatch(r"[lL]ist\[(.*)\]", kind):
        if not isinstance(value, list):
            return [f"{where}: must be a list"]
        return [found for i, each in enumerate(value) for found in problems(each, match[1], f"{where}[{i}]")]
    if match := re.fullmatch(r"[dD]ict[(\[]str, (.*)[)\]]", kind):
        if not isinstance(value, dict):
            return [f"{where}: must be an object"]
        return [found for key, each in value.items() for found in problems(each, match[1], f"{where}.{key}")]
    if kind in PLAIN:
        right = isinstance(value, PLAIN[kind]) and (kind != "int" or not isinstance(value, bool))
        return [] if right else [f"{where}: must be {kind}"]
    return of_model(value, kind, where)


def of_model(value, kind, where):
    model = getattr(kserve_models, kind, None) or getattr(kubernetes_models, kind, None)
    if model is None:
        return [f"{where}: no model {kind}"]
    fields = {json_name: name for name, json_name in model.attribute_map.items()}
    found = [f"{where}.{name}: unknown" for name in value.keys() - fields.keys()]
    for name in value.keys() & fields.keys():
        found += problems(value[name], model.openapi_types[fields[name]], f"{where}.{name}")
    return found


def of_document(document):
    group, _, version = document["apiVersion"].partition("/")
    if group != "serving.kserve.io":
        return [f"{document['apiVersion']}: unknown"]
    return of_model(document, f"{version[0].upper()}{version[1:]}{document['kind']}", document["kind"])


print(json.dumps([found for path in sys.argv[1:] for found in of_document(yaml.safe_load(Path(path).read_text()))]))
