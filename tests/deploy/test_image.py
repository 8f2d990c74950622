"""The Dockerfile, without building it."""

import json
import re

from .files import DEFAULTS, ROOT, VERSION, accepted

TEXT = re.sub(r"^ *#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
STAGES = TEXT.split("FROM ")[1:]
LAST = [line.split(maxsplit=1) for line in STAGES[-1].splitlines()[1:] if line]


def the(instruction):
    (argument,) = [rest for word, rest in LAST if word == instruction]
    return argument


def test_what_is_shipped_has_no_compiler_and_no_pip():
    assert len(STAGES) == 2
    images = {stage.split()[0] for stage in STAGES}
    assert len(images) == 1  # the virtual environment is of its Python
    assert images.pop().endswith("-slim")
    assert "--without-pip" in STAGES[0]
    assert not any(re.search(r"\bpip\b", rest) for word, rest in LAST if word == "RUN")


def test_it_serves_with_tokens_as_somebody_who_is_not_root(monkeypatch):
    settings = accepted({}, monkeypatch)
    assert settings.host == "0.0.0.0"
    assert settings.has_tokens
    (volume,) = {the("VOLUME"), str(settings.tokens_file.parent)}
    assert settings.store.startswith(f"sqlite:///{volume}/")
    user = the("USER")
    assert int(user) > 0
    (made,) = [rest for word, rest in LAST if word == "RUN"]
    assert f"--uid {user} " in made
    assert re.search(rf"install -d -o batchnorm -g batchnorm {volume}\b", made)


def test_signals_reach_the_service():
    assert json.loads(the("ENTRYPOINT")) == ["tini", "--"]
    assert json.loads(the("CMD")) == ["batchnorm-service", "serve"]
    assert "STOPSIGNAL" not in dict(LAST)  # SIGTERM


def test_its_health_check_asks_what_listens():
    assert the("EXPOSE") == str(DEFAULTS.port)
    options, _, command = the("HEALTHCHECK").partition(" CMD ")
    interpreter, _, code = json.loads(command)
    assert interpreter == "python"
    compile(code, "HEALTHCHECK", "exec")
    assert f"http://127.0.0.1:{DEFAULTS.port}/readyz" in code
    assert "--start-period=" in options


def test_labels():
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', the("LABEL")))
    assert labels.keys() == {"title", "description", "version", "revision", "licenses"}
    assert ["ARG", f"VERSION={VERSION}"] in LAST
    assert labels["version"] == "${VERSION}"
    project = (ROOT / "pyproject.toml").read_text()
    assert f'license = "{labels["licenses"]}"' in project
    assert f'description = "{labels["description"]}"' in project


def test_what_the_build_copies_is_not_ignored():
    rules = (ROOT / ".dockerignore").read_text().split()
    sources = [word for rest in re.findall(r"^COPY (?!--)(.*) \S+$", STAGES[0], re.M) for word in rest.split()]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source.partition('/')[0]}" in rules, source
