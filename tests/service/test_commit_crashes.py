"""The service is killed at every point of a commit: all of it took effect or nothing, and once if it is repeated."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from .account import Account
from .conftest import environment
from .faulty import PROGRAM, FaultyService

pytestmark = pytest.mark.slow

BEGIN, RECORD, RECEIPT = "BEGIN IMMEDIATE", "INSERT INTO layers (name, incarnation,", "INSERT OR REPLACE INTO receipts"
KEPT, TRIM, PIN = "INSERT OR REPLACE INTO kept", "DELETE FROM kept WHERE incarnation", "INSERT OR REPLACE INTO pins"
PURGE, COMMIT, DONE = "DELETE FROM receipts WHERE id", "COMMIT", "after COMMIT"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyService]:
    directory = tmp_path_factory.mktemp("faulty")
    service = FaultyService(directory, f"sqlite:///{directory}/layers.db", BATCHNORM_HISTORY_SECONDS="0")
    yield service
    assert service.process.stop() == 0
    service.process.close()


def asked(call: Any, *arguments: Any) -> httpx.Response | None:
    """The answer, if there was one."""
    try:
        return call(*arguments)
    except httpx.TransportError:
        return None


def prepared(http: httpx.Client, url: str, name: str) -> Account:
    """A layer with a history and two pins."""
    account = Account(http, url, name)
    account.prepare()
    account.pin("late")
    account.train(4)
    return account


class Train:
    """One of the changes that are interrupted.

    Attributes:
        points: where it must have been interrupted, among other points.
    """

    points = (BEGIN, KEPT, TRIM, RECORD, RECEIPT, PURGE, COMMIT, DONE)

    def __init__(self, account: Account) -> None:
        self.account = account

    def call(self) -> httpx.Response:
        return self.account.send(5)

    def count(self) -> None:
        """Note that it has taken effect."""
        self.account.count(5)

    def check_repeat(self, answer: httpx.Response, *, done: bool) -> None:
        """The answer to the same call again, which has taken effect before if `done`."""
        assert answer.status_code == 200, answer.text
        assert ("Idempotent-Replay" in answer.headers) == done
        assert answer.json()["num_batches_tracked"] == 5


class PinNewest(Train):
    points = (BEGIN, KEPT, PIN, PURGE, COMMIT, DONE)

    def call(self) -> httpx.Response:
        return self.account.send_pin("new")

    def count(self) -> None:
        self.account.pinned["new"] = self.account.expected

    def check_repeat(self, answer: httpx.Response, *, done: bool) -> None:
        assert answer.status_code == (200 if done else 201), answer.text


class Unpin(Train):
    points = (BEGIN, "DELETE FROM pins WHERE incarnation", TRIM, PURGE, COMMIT, DONE)

    def call(self) -> httpx.Response:
        return self.account.http.delete(f"{self.account.url}/pins/early")

    def count(self) -> None:
        del self.account.pinned["early"]

    def check_repeat(self, answer: httpx.Response, *, done: bool) -> None:
        assert answer.status_code == (404 if done else 204), answer.text


class Rollback(Train):
    def call(self) -> httpx.Response:
        return self.account.rollback("early")

    def count(self) -> None:
        self.account.count_rollback("early")

    def check_repeat(self, answer: httpx.Response, *, done: bool) -> None:
        assert answer.status_code == 200, answer.text
        assert ("Idempotent-Replay" in answer.headers) == done
        assert answer.json()["num_batches_tracked"] == 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("change", [Train, PinNewest, Unpin, Rollback])
def test_a_change_that_is_killed_anywhere(service: FaultyService, http: httpx.Client, change: type[Train]) -> None:
    bystander = prepared(http, service.url, f"bystander-{change.__name__}")
    untouched = bystander.check()
    points: list[str] = []
    for number in itertools.count():
        layer = prepared(http, service.url, f"{change.__name__}-{number}")
        interrupted = change(layer)
        before = layer.check()
        service.kill_at(number)
        answer = asked(interrupted.call)
        if not (point := service.died_at()):
            assert answer is not None
            interrupted.check_repeat(answer, done=False)
            break
        points.append(point)
        assert answer is None
        done = point == DONE
        if done:
            interrupted.count()
        found = layer.check()
        assert (found == before) != done
        interrupted.check_repeat(interrupted.call(), done=done)
        if not done:
            interrupted.count()
        layer.check()
        layer.train(6)
        after = layer.check()
        assert after["layer"]["version"] > found["layer"]["version"] >= before["layer"]["version"]
        assert bystander.check() == untouched
    assert {*change.points} <= {*points}
    assert points.index(COMMIT) == len(points) - 2


@pytest.mark.timeout(300)
def test_a_layer_that_is_created_and_deleted(service: FaultyService, http: httpx.Client) -> None:
    """Neither half a layer nor half a deletion is left, and a version never comes again."""
    bystander = prepared(http, service.url, "bystander")
    untouched = bystander.check()
    points: dict[str, list[str]] = {"create": [], "delete": []}
    for number in itertools.count():
        layer = Account(http, service.url, f"fresh-{number}")
        service.kill_at(number)
        asked(layer.create)
        created = service.died_at()
        assert http.get(layer.url).status_code == (404 if created not in {DONE, ""} else 200)
        assert layer.create().status_code == (201 if created not in {DONE, ""} else 200)
        layer.train(1, 2)
        layer.pin("early")
        before = layer.check()
        service.kill_at(number)
        answer = asked(http.delete, f"{layer.url}?pins=delete")
        deleted = service.died_at()
        if deleted in {DONE, ""}:
            assert http.get(layer.url).status_code == 404
            assert answer is None or deleted == ""
        else:
            assert layer.check() == before
            assert http.delete(f"{layer.url}?pins=delete").status_code == 204
        assert http.delete(layer.url).status_code == 404
        again = Account(http, service.url, layer.name)
        assert again.create().status_code == 201
        assert again.check()["layer"]["version"] > before["layer"]["version"]
        again.train(1)
        assert bystander.check() == untouched
        points["create"].append(created)
        points["delete"].append(deleted)
        if not (created or deleted):
            break
    assert {BEGIN, RECORD, "UPDATE meta SET layers =", COMMIT, DONE} <= {*points["create"]}
    assert {BEGIN, "DELETE FROM layers WHERE name", TRIM, COMMIT, DONE} <= {*points["delete"]}


def test_a_service_that_is_killed_after_its_answers(start: Any, http: httpx.Client, store: str) -> None:
    service = start("--store", store)
    account = prepared(http, service.url, "bn")
    assert account.rollback("early").status_code == 200
    account.count_rollback("early")
    served = account.check()
    service.close()
    account.url = f"{start('--store', store).url}/v1/layers/bn"
    assert account.check() == served
    assert account.rollback("early").headers["Idempotent-Replay"] == "true"
    assert account.check() == served


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("killed", ["service", "before the rename", "after the rename"])
def test_a_backup_that_is_killed(http: httpx.Client, start: Any, tmp_path: Path, killed: str) -> None:
    """A file of the backup's name is whole, an earlier one stays, and the next call succeeds."""
    store, file = f"sqlite:///{tmp_path}/layers.db", tmp_path / "backup.db"
    service = FaultyService(tmp_path, store)
    account = prepared(http, service.url, "bn")
    backup = "-m", "batchnorm_service", "backup", file, "--store", store
    assert command(*backup).returncode == 0
    first = file.read_bytes()
    account.train(5)
    if killed == "service":
        service.kill_at("copy")
        assert command(*backup).returncode == 1
        assert service.died_at() == "copy"
        assert [each.name for each in tmp_path.glob("backup.db*")] == ["backup.db"]
    else:
        service.kill_at("rename" if killed == "before the rename" else "renamed")
        assert command(PROGRAM, tmp_path, *backup[2:]).returncode == -9
    assert (file.read_bytes() == first) == (killed != "after the rename")
    served = account.check()
    assert command(*backup).returncode == 0
    assert [each.name for each in tmp_path.glob("backup.db*")] == ["backup.db"]
    account.train(6)
    assert service.process.stop() == 0
    service.process.close()
    assert command("-m", "batchnorm_service", "restore", file, "--store", store, "--overwrite").returncode == 0
    restored = Account(http, start("--store", store).url, "bn")
    restored.module, restored.pinned = account.module, account.pinned
    restored.module.reset_running_stats()
    for seed in range(1, 6):
        restored.count(seed)
    assert restored.check() == served
    assert np.array_equal(restored.state()["running_mean"], account.expected["running_mean"])
