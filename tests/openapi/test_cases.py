"""schemathesis: requests made from the OpenAPI document, valid and invalid, also in sequences along its links.

See docs/testing.md. `make schemathesis CASES=20000` makes more of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from service.conftest import environment, start

__all__ = ["start"]

HERE = Path(__file__).parent
CASES = int(os.environ.get("BATCHNORM_TEST_CASES", "0"))
CASES_PER_EXAMPLE = 24  # as measured
LAYERS = {
    "moving": {"num_features": 1},
    "population": {"num_features": 1, "statistics": "population", "momentum": None, "non_finite": "allow"},
}


@pytest.mark.timeout(0 if CASES else 120)
@pytest.mark.parametrize("fast_path", ["1", "0"])
def test_requests_made_from_the_document(start, tmp_path, measured, fast_path):
    limits = {"BATCHNORM_MAX_LAYERS": "200", "BATCHNORM_MAX_BODY_BYTES": "1048576"}
    service = start("--store", "memory:", BATCHNORM_FAST_PATH=fast_path, **limits)
    for name, config in LAYERS.items():
        httpx.put(f"{service.url}/v1/layers/{name}", json=config).raise_for_status()
    chosen = ["--max-examples", max(1, CASES // 2 // CASES_PER_EXAMPLE)]
    done = run(service, tmp_path, *chosen, *([] if CASES else ["--seed", 1, "--generation-deterministic"]))
    assert done.returncode == 0, done.stdout + done.stderr + service.output
    cases = int(re.search(r"(\d+) generated", done.stdout)[1])
    measured.append(f"schemathesis: {cases} cases with BATCHNORM_FAST_PATH={fast_path}")
    assert cases > 500
    assert "Traceback" not in service.output


def test_a_document_that_is_wrong_is_found(start, tmp_path):
    service = start("--store", "memory:")
    only = ("--include-operation-id", "create_layer", "--phases", "coverage", "--no-shrink", "--seed", 1)
    done = run(service, tmp_path, *only, PLANTED="1")
    assert done.returncode == 1
    assert "Response violates schema" in done.stdout


def run(service, folder, *options, **variables):
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", HERE / "schemathesis.toml", "run"]
    command += [f"{service.url}/openapi.json", "--no-color", "--continue-on-failure", *options]
    variables |= {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [*map(str, command)],
        env=environment(**variables),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
