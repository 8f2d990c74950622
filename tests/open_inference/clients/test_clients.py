"""tritonclient and kserve's client, as they come, call a real server: each call of the table in docs/open-inference.md.

The clients are no part of the project's environment: `make test` puts them into `.venv-inference`.
"""

import json
import re
import subprocess
from pathlib import Path

import httpx
import pytest
import torch

from service.conftest import Process

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PYTHON = ROOT / ".venv-inference" / "bin" / "python"
TABLE = (ROOT / "docs" / "open-inference.md").read_text().partition("## tritonclient")[2].partition("## KServe")[0]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no tritonclient and kserve: make .venv-inference/clients.stamp"),
]

ROWS = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.5, -7.25]], dtype=torch.float64)
DTYPES = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32, "FP64": torch.float64}


@pytest.fixture(scope="module")
def service():
    """With layers whose newest state is not the one that is pinned as `ckpt`."""
    service = Process("--store", "memory:")
    with httpx.Client(base_url=f"{service.url}/v1/layers/") as client:
        for name in ("bn", "wide", "trained", "by-kserve"):
            client.put(name, json={"num_features": 2, "dtype": "float64" if name == "wide" else "float32"})
        for rows in (ROWS, ROWS * 3 + 1):
            for name in ("bn", "wide"):
                client.post(f"{name}/train", json={"input": rows.tolist()}).raise_for_status()
                client.put(f"{name}/pins/ckpt", json={})
    yield service
    service.close()


def told_by(script, argument):
    done = subprocess.run([PYTHON, HERE / script, argument], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected(service, name, datatype, at=None):
    """What torch makes of the rows with a state of a layer."""
    layer = httpx.get(f"{service.url}/v1/layers/{name}", params={} if at is None else {"at": at}).json()
    dtype = torch.float64 if name == "wide" else torch.float32
    mean, var = (torch.tensor(layer[of], dtype=dtype) for of in ("running_mean", "running_var"))
    return torch.nn.functional.batch_norm(ROWS.to(DTYPES[datatype]), mean, var)


def check(found, wanted):
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64).to(wanted.dtype), wanted)


REFUSED = {
    "no model": "[404] there is no layer 'none'",
    "no tag": "[404] layer 'bn' has no pin none",
    "all statistics": "[404] there is no layer 'stats'",
    "statistics of a version": "[404] there is nothing at",
    "a parameter": "[422] parameters.moed: is not known; known are mode, at",
    "a query": "[422] at: is not known",
    "compressed": "[415] the service reads no compressed bodies",
    "classes": "[422] outputs.0.parameters.classification: is not known",
    "shared input": "[422] inputs.0.parameters.shared_memory_region: is not known",
    "shared output": "[422] outputs.0.parameters.shared_memory_region: is not known",
    "another dtype": "[422] input must be float16 or bfloat16 or float32",
}
REFUSED |= dict.fromkeys(("config", "load", "unload", "trace", "update trace", "log", "update log"), "[404] there is")
REFUSED |= {
    f"{what}{kind} memory": "[404] there is nothing at"
    for what in ("", "register ", "unregister ")
    for kind in ("system", "cuda")
}


def test_tritonclient(service):
    found = told_by("call_triton.py", service.url.removeprefix("http://"))
    methods, rest = found["sync"].pop("methods"), found["sync"].pop("body")
    assert rest == [24, "7"]
    assert set(methods) <= set(re.findall(r"\b\w+\b", TABLE))  # the table has every call
    calls = (HERE / "call_triton.py").read_text()
    offline = {"close", "plugin", "register_plugin", "unregister_plugin", "parse_response_body"}
    assert [name for name in methods if f".{name}(" not in calls and name not in offline] == []
    newest, pinned = expected(service, "bn", "FP32"), expected(service, "bn", "FP32", "ckpt")
    assert not torch.equal(newest, pinned)
    for way, told in found.items():
        assert {name: told[name] for name in ("live", "ready", "model ready", "version ready")} == dict.fromkeys(
            ("live", "ready", "model ready", "version ready"), True
        )
        assert (told["no model ready"], told["no version ready"]) == (False, False)
        assert told["server"]["extensions"][0] == "binary_tensor_data"
        assert told["model"] == told["version"]
        assert (told["model"]["versions"][0], told["model"]["versions"][-1]) == ("3", "ckpt")
        assert [layer["name"] for layer in told["index"]] == ["bn", "by-kserve", "trained", "wide"]
        assert told["statistics"]["model_stats"][0]["name"] == "bn"
        for name, words in REFUSED.items():
            assert told[name].startswith(words), (way, name, told[name])
        for name in ("plain", "id", "ignored", "compressed response"):
            check(told[name]["output"], newest)
        assert told["id"]["id"] == "42"
        for name in ("tag", "at"):
            check(told[name]["output"], pinned)
        assert told["again"]["output"] == told["train"]["output"]
        assert told["again"]["parameters"] == {"num_batches_tracked": 1, "idempotent_replay": True}
        check(told["train"]["output"], torch.nn.functional.batch_norm(ROWS.float(), None, None, training=True))
        assert (told["empty"]["output"], told["empty as json"]["output"]) == ([], [])
        assert told["async"] == [str(n) for n in range(8)]
        forms = [name for name in told if name[:4] in DTYPES]
        assert len(forms) == 14
        for name in forms:
            assert told[name]["dtype"] == str(DTYPES[name[:4]]).removeprefix("torch.")
            check(told[name]["output"], expected(service, "wide" if name.startswith("FP64") else "bn", name[:4]))
    layer = httpx.get(f"{service.url}/v1/layers/trained").json()
    assert layer["num_batches_tracked"] == 1


def test_kserve(service):
    told = told_by("call_kserve.py", service.url)
    assert (told["live"], told["ready"], told["model ready"], told["no model ready"]) == (True, True, True, False)
    newest, pinned = expected(service, "bn", "FP32"), expected(service, "bn", "FP32", "ckpt")
    check(told["output"]["output"], newest)
    check(told["at"]["output"], pinned)
    assert told["output"]["model"] == "bn"
    forms = [name for name in told if name[:4] in DTYPES]
    assert len(forms) == 11
    for name in forms:
        assert told[name]["datatype"] == name[:4]
        check(told[name]["output"], expected(service, "wide" if name.startswith("FP64") else "bn", name[:4]))
    assert told["train"] == told["again"]
    check(told["train"]["output"], torch.nn.functional.batch_norm(ROWS.float(), None, None, training=True))
    assert httpx.get(f"{service.url}/v1/layers/by-kserve").json()["num_batches_tracked"] == 1
    assert told["empty True"]["output"] == told["empty False"]["output"] == []
    assert told["no model"].startswith("there is no layer 'none'")
    assert told["a parameter"].startswith("parameters.moed: is not known")
