"""`batchnorm-service backup` and `restore` beside a running service, and files that are damaged."""

import itertools
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from .conftest import COMMAND, environment

BATCH = {"input": [[1.0, 2.0], [3.0, 5.0]]}


def run(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "batchnorm_service", *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def train(http, url, key):
    answer = http.post(f"{url}/v1/layers/bn/train", json=BATCH, headers={"Idempotency-Key": key})
    answer.raise_for_status()
    return answer


class Trainer(threading.Thread):
    """Sends batches until it is stopped.

    Attributes:
        acknowledged: how many.
    """

    def __init__(self, url):
        super().__init__(daemon=True)
        self.acknowledged = 0
        self._url = url
        self._ended = threading.Event()
        self.first = threading.Event()

    def run(self):
        with httpx.Client(timeout=60) as http:
            for number in itertools.count(1):
                if self._ended.is_set():
                    return
                train(http, self._url, f"batch-{number}")
                self.acknowledged = number
                self.first.set()

    def stop(self):
        self._ended.set()
        self.join()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_running_service_is_backed_up_and_restored(start, http, store, tmp_path, workers):
    service = start("--store", store, "--workers", str(workers))
    http.put(f"{service.url}/v1/layers/bn", json={"num_features": 2}).raise_for_status()
    trainer = Trainer(service.url)
    trainer.start()
    assert trainer.first.wait(60)
    before, file = trainer.acknowledged, tmp_path / "backup.db"
    done = run("backup", file, BATCHNORM_STORE=store)
    after = trainer.acknowledged
    trainer.stop()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{file}: backup complete and checked\n"
    in_use = run("restore", file, "--store", store, "--overwrite")
    assert in_use.returncode == 1
    assert "is in use by another process; stop the service first" in in_use.stderr
    assert train(http, service.url, "one-more").json()["num_batches_tracked"] == trainer.acknowledged + 1
    assert service.stop() == 0

    kept = run("restore", file, "--store", store)
    assert kept.returncode == 1
    assert "--overwrite replaces it" in kept.stderr
    done = run("restore", file, "--store", store, "--overwrite")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{file}: restored\n", "")
    service = start("--store", store)
    count = http.get(f"{service.url}/v1/layers/bn").json()["num_batches_tracked"]
    assert before <= count <= after + 1
    again = train(http, service.url, f"batch-{count}")
    assert (again.headers["Idempotent-Replay"], again.json()["num_batches_tracked"]) == ("true", count)
    assert "Idempotent-Replay" not in train(http, service.url, f"batch-{count + 1}").headers


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_damaged_file_is_not_served_but_restored(start, http, store, tmp_path, workers):
    service = start("--store", store)
    for number in range(50):
        http.put(f"{service.url}/v1/layers/bn{number}", json={"num_features": 2}).raise_for_status()
    assert service.stop() == 0
    path, file = tmp_path / "layers.db", tmp_path / "backup.db"
    assert run("backup", file, "--store", store).returncode == 0
    with path.open("r+b") as damaged:
        damaged.seek(os.path.getsize(path) // 4096 // 2 * 4096)
        damaged.write(b"\xff" * 4096)
    done = run(*COMMAND[3:], "--store", store, "--workers", workers)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{path} is damaged: " in done.stderr
    assert "restore a backup: batchnorm-service restore FILE --overwrite" in done.stderr
    assert "Traceback" not in done.stderr
    again = run("backup", file, "--store", store)
    assert again.returncode == 2
    assert "is damaged" in again.stderr
    assert run("restore", file, "--store", store, "--overwrite").returncode == 0
    service = start("--store", store)
    assert len(http.get(f"{service.url}/v1/layers?limit=1000").json()["layers"]) == 50


def test_a_service_that_stops_ends_a_backup_with_an_error_or_complete(start, http, store, tmp_path):
    service = start("--store", store)
    http.put(f"{service.url}/v1/layers/bn", json={"num_features": 2}).raise_for_status()
    file = tmp_path / "backup.db"
    backup = subprocess.Popen(
        [sys.executable, "-m", "batchnorm_service", "backup", str(file), "--store", store],
        env=environment(),
        stderr=subprocess.PIPE,
    )
    assert service.stop(signal.SIGKILL) == -signal.SIGKILL
    _, errors = backup.communicate(timeout=60)
    assert backup.returncode == (0 if file.exists() else 1), errors
    assert b"Traceback" not in errors
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["backup", "b.db", "--store", "memory:"], 2, "memory: lives in the process"),
        (["backup", "b.db", "--store", "sqlite:////nowhere/layers.db"], 2, "there is no file /nowhere/layers.db"),
        (["backup", "b.db", "--store", "mysql://localhost"], 2, "mysql"),
        (["restore", "b.db", "--store", "mysql://localhost"], 2, "mysql"),
        (["backup"], 2, "FILE"),
        (["restore", "/nowhere/b.db", "--store", "sqlite:////nowhere/layers.db"], 1, "there is no file /nowhere/b.db"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments, status, words):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
