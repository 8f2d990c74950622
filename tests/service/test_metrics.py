"""`/metrics` of a service with several workers: every worker knows all counts, also those of a killed one."""

import os
import signal
from pathlib import Path

import httpx
import pytest

from store.valkey_servers import wait_for
from telemetry.reading import read, total

from .test_workers import WORKERS, worker_pids

BATCH = {"input": [[1, 2], [3, 5]]}
EVAL = {"method": "POST", "route": "/v1/layers/{name}/eval"}


def scrape(url):
    """By a connection of its own, which any worker accepts."""
    return read(httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text)


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="workers are found in Linux's /proc")
def test_counts_equal_the_calls_made_also_after_a_worker_was_killed(start, store, tmp_path):
    service = start("--store", store, "--workers", str(WORKERS), TMPDIR=str(tmp_path))
    layer = f"{service.url}/v1/layers/a"
    httpx.put(layer, json={"num_features": 2}).raise_for_status()
    made = {"train": 0, "eval": 0, "missing": 0}

    def calls(count):
        for _ in range(count):
            httpx.post(f"{layer}/train", json=BATCH).raise_for_status()
            httpx.post(f"{layer}/eval", json=BATCH).raise_for_status()
            assert httpx.post(f"{service.url}/v1/layers/b/eval", json=BATCH).status_code == 404
            for call in made:
                made[call] += 1

    def check():
        for _ in range(2 * WORKERS):
            found = scrape(service.url)
            assert total(found, "batchnorm_requests_total", **EVAL, outcome="2xx") == made["eval"]
            assert total(found, "batchnorm_requests_total", **EVAL, outcome="layer-not-found") == made["missing"]
            assert total(found, "batchnorm_folds_total") == made["train"]
            assert total(found, "batchnorm_receipts_total") == made["train"]
            assert total(found, "batchnorm_request_seconds_count", **EVAL) == made["eval"] + made["missing"]
        return found

    calls(40)
    before = check()
    assert total(before, "batchnorm_workers") == total(before, "batchnorm_worker_starts_total") == WORKERS
    for pid in sorted(worker_pids(service.process.pid))[:2]:
        os.kill(pid, signal.SIGKILL)
    check()
    wait_for("killed workers come back", lambda: total(scrape(service.url), "batchnorm_workers") == WORKERS)
    calls(40)
    after = check()
    assert total(after, "batchnorm_worker_starts_total") == WORKERS + 2
    assert all(after[key] >= before[key] for key in before if key[0].endswith(("_total", "_count", "_bucket", "_sum")))
    assert list(tmp_path.glob("batchnorm-metrics-*"))
    assert service.stop() == 0
    assert not list(tmp_path.glob("batchnorm-metrics-*"))
