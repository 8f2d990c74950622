"""deploy/kserve/: the manifests by KServe's own models, and its transformer in a real server of KServe."""

import os
import re
import subprocess
from contextlib import contextmanager

import httpx
import pytest
import torch

from batchnorm_service.app import create_app
from batchnorm_service.settings import Settings
from batchnorm_service.tokens import Scope, add_token
from service.conftest import Process
from store.valkey_servers import free_port, wait_for

from .files import DEFAULTS, DEPLOY, ROOT, STOPPING_SECONDS, VERSION, accepted, load

KSERVE = DEPLOY / "kserve"
MANIFESTS = sorted(KSERVE.glob("*.yaml"))
PYTHON = ROOT / ".venv-inference/bin/python"
CLIENTS = ROOT / "tests/open_inference/clients/requirements.txt"

(RUNTIME,) = load("kserve/serving-runtime.yaml")
(SERVICE,) = load("kserve/inference-service.yaml")
(TRANSFORMER,) = load("kserve/transformer.yaml")
(SERVES,) = RUNTIME["spec"]["containers"]
(TRANSFORMS,) = TRANSFORMER["spec"]["transformer"]["containers"]

needs_kserve = pytest.mark.skipif(not PYTHON.exists(), reason="no kserve: make .venv-inference/clients.stamp")


@pytest.mark.slow
@needs_kserve
def test_kserve_knows_every_field(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(
        MANIFESTS[-1].read_text().replace("modelFormat:", "modelFormats:").replace("minReplicas: 1", "minReplicas: x")
    )
    command = [PYTHON, ROOT / "tests/deploy/kserve_models.py"]
    told = [
        subprocess.run([*command, *paths], capture_output=True, text=True, check=True) for paths in (MANIFESTS, [wrong])
    ]
    assert told[0].stdout == "[]\n"
    assert re.findall(r"(\w+): (unknown|must be int)", told[1].stdout)


def test_the_runtime_takes_its_settings(monkeypatch):
    given = {entry["name"]: entry.get("value", "valkey://valkey:6379/0") for entry in SERVES["env"]}
    settings = accepted(given, monkeypatch)
    mounts = {mount["name"]: mount["mountPath"] for mount in SERVES["volumeMounts"]}
    assert str(settings.tokens_file) == f"{mounts['tokens']}/tokens"
    assert mounts.keys() == {volume["name"] for volume in RUNTIME["spec"]["volumes"]}
    assert (
        str(SERVES["securityContext"]["runAsUser"])
        == re.search(r"^USER (.*)$", (ROOT / "Dockerfile").read_text(), re.M)[1]
    )
    assert SERVES["image"] == f"batchnorm:{VERSION}"


def test_the_runtime_is_asked_by_protocol_v2():
    paths = create_app(Settings(store="memory:")).app.openapi()["paths"]
    assert [port["containerPort"] for port in SERVES["ports"]] == [DEFAULTS.port]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = SERVES[name]["httpGet"]
        assert get["path"] == f"/v2/health/{'ready' if name == 'readinessProbe' else 'live'}"
        assert get["path"] in paths
        assert get["port"] == DEFAULTS.port
    assert RUNTIME["spec"]["annotations"]["prometheus.kserve.io/port"] == str(DEFAULTS.port)
    assert RUNTIME["spec"]["annotations"]["prometheus.kserve.io/path"] in paths
    assert RUNTIME["spec"]["protocolVersions"] == ["v2"]


def test_the_inference_service_finds_its_runtime():
    predictor = SERVICE["spec"]["predictor"]
    assert predictor["model"]["runtime"] == RUNTIME["metadata"]["name"]
    assert predictor["model"]["modelFormat"] in RUNTIME["spec"]["supportedModelFormats"]
    assert predictor["model"]["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
    assert predictor["enableServiceLinks"] is False
    stop = int(SERVES["lifecycle"]["preStop"]["exec"]["command"][1])
    assert predictor["terminationGracePeriodSeconds"] >= stop + STOPPING_SECONDS + 5


def test_images_are_of_this_version():
    tag = re.search(r"docker build -t (\S+) (\S+)$", (KSERVE / "transformer.yaml").read_text(), re.M)
    assert tag[1] == TRANSFORMS["image"] == f"batchnorm-transformer:{VERSION}"
    assert (ROOT / tag[2] / "Dockerfile").exists()


@pytest.mark.slow
@needs_kserve
def test_the_transformers_image_has_what_the_tests_have_of_kserve():
    pinned = re.findall(r"^\w.*$", (KSERVE / "transformer/requirements.txt").read_text(), re.M)
    assert {*pinned} <= {*CLIENTS.read_text().splitlines()}
    done = subprocess.run([PYTHON, "-c", NEEDED], capture_output=True, text=True, check=True)
    assert {re.sub("[-_.]+", "-", line.partition("==")[0]).lower() for line in pinned} == {*done.stdout.split()}


NEEDED = """
import re
from importlib.metadata import PackageNotFoundError, requires
from packaging.requirements import Requirement

found, todo = set(), ["kserve"]
while todo:
    name = re.sub("[-_.]+", "-", todo.pop()).lower()
    if name not in found:
        try:
            needed = map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue
        found.add(name)
        todo += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
print(*found)
"""


def test_secrets_are_made_as_the_docs_say():
    docs = (ROOT / "docs/deploy.md").read_text().partition("\n## KServe\n")[2]
    entries = [
        entry["valueFrom"]["secretKeyRef"] for entry in SERVES["env"] + TRANSFORMS["env"] if "valueFrom" in entry
    ]
    used = {(entry["name"], entry["key"]) for entry in entries}
    used |= {(each["secret"]["secretName"], "tokens") for each in RUNTIME["spec"]["volumes"] if "secret" in each}
    assert used == {*re.findall(r"create secret generic (\S+) --from-(?:file|literal)=(\w+)", docs)}


ROWS = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.5, -7.25]])
FIRST, SECOND = torch.tensor([[0.0, 1.0], [4.0, 2.0]]), torch.tensor([[8.0, -3.0], [1.0, 1.0], [2.0, 9.0]])


@pytest.fixture(scope="module")
def transforming(tmp_path_factory):
    """`transforming(argument)` is the address of the transformer with the arguments of its manifest and these.

    The predictor is a layer too, `classifier`, of a service without tokens.
    """
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    admin, reader = (add_token(tokens, scope, "")[0] for scope in (Scope.ADMIN, Scope.READ))
    services = [Process("--store", "memory:", BATCHNORM_TOKENS_FILE=str(tokens)), Process("--store", "memory:")]
    layers, predictor = services
    headers = {"Authorization": f"Bearer {admin}"}
    with httpx.Client(headers=headers) as client:
        for url in (f"{layers.url}/v1/layers/features", f"{predictor.url}/v1/layers/classifier"):
            client.put(url, json={"num_features": 2}).raise_for_status()
            client.post(f"{url}/train", json={"input": FIRST.tolist()}).raise_for_status()
        client.put(f"{layers.url}/v1/layers/features/pins/ckpt-100k", json={}).raise_for_status()
        client.post(f"{layers.url}/v1/layers/features/train", json={"input": SECOND.tolist()}).raise_for_status()

    @contextmanager
    def transforming(*more):
        port = str(free_port())
        told = [each for each in TRANSFORMS["args"] if not each.startswith("--url=")]
        told += [f"--url={layers.url}", "--model_name", "classifier", "--http_port", port, *more]
        told += ["--predictor_host", predictor.url.removeprefix("http://")]
        (name,) = [entry["name"] for entry in TRANSFORMS["env"]]
        process = subprocess.Popen(
            [PYTHON, KSERVE / "transformer/transformer.py", *told],
            env=os.environ | {name: reader},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for("the transformer is ready", lambda: process.poll() is not None or ready(url))
            yield url
        finally:
            process.terminate()
            process.wait(timeout=30)

    yield transforming
    for service in services:
        service.close()


def ready(url):
    try:
        return httpx.get(f"{url}/v2/models/classifier/ready").status_code == 200
    except httpx.TransportError:
        return False


def layer(*batches):
    """torch's module after these batches, in eval mode."""
    module = torch.nn.BatchNorm1d(2)
    for batch in batches:
        module(batch)
    return module.eval()


def infer(url, rows, **more):
    given = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "data": rows.flatten().tolist()} | more
    return httpx.post(f"{url}/v2/models/classifier/infer", json={"inputs": [given]}, timeout=30)


@pytest.mark.slow
@needs_kserve
@pytest.mark.parametrize(("arguments", "batches"), [((), (FIRST, SECOND)), (("--at=ckpt-100k",), (FIRST,))])
def test_a_predictor_gets_what_the_layer_normalized(transforming, arguments, batches):
    assert TRANSFORMER["metadata"]["name"] == "classifier"
    # The predictor's layer knows its input as `input`.
    with transforming("--input=input", *arguments) as url:
        answer = infer(url, ROWS, name="input")
        whole = infer(url, ROWS.round(), name="input", datatype="INT64", data=ROWS.round().long().flatten().tolist())
        wrong = infer(url, ROWS.T, name="input")
        missing = infer(url, ROWS, name="x")
        old = httpx.post(f"{url}/v1/models/classifier:predict", json={"instances": ROWS.tolist()})
    with torch.no_grad():
        expected = [layer(FIRST)(layer(*batches)(rows)) for rows in (ROWS, ROWS.round())]
    for given, wanted in zip((answer, whole), expected, strict=True):
        assert given.status_code == 200, given.text
        (output,) = given.json()["outputs"]
        torch.testing.assert_close(torch.tensor(output["data"]).reshape(output["shape"]), wanted)
    assert wrong.status_code == missing.status_code == old.status_code == 400
    assert "input must have 2 channels on axis 1" in wrong.text
    assert "there must be an input 'input', got ['x']" in missing.text
    assert "call /v2/models/classifier/infer" in old.text
