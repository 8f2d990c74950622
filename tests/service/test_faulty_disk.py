"""System calls of a real service fail: flushes, writes to a full disk, torn writes, crashes around a flush."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from .account import Account
from .faulty import FaultyService

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc are Linux's"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]

SOURCE = Path(__file__).parent / "programs" / "faulty_disk.c"


class Disk:
    """The file that says which fault there is."""

    def __init__(self, control: Path) -> None:
        self.control = control

    def fails(self, fault: str) -> None:
        temporary = self.control.with_suffix(".new")
        temporary.write_text(fault)
        temporary.replace(self.control)

    def works(self) -> None:
        self.control.unlink()

    @property
    def died(self) -> bool:
        return not self.control.exists()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def service(directory: Path) -> Iterator[FaultyService]:
    library = directory / "faulty_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(SOURCE)], check=True)
    service = FaultyService(
        directory,
        f"sqlite:///{directory}/layers.db",
        BATCHNORM_HISTORY_SECONDS="0",
        BATCHNORM_STORE_TIMEOUT_SECONDS="0.2",
        LD_PRELOAD=str(library),
        FAULTY_DISK=str(directory / "fault"),
    )
    yield service
    assert service.process.stop() == 0
    service.process.close()


@pytest.fixture
def disk(directory: Path) -> Iterator[Disk]:
    disk = Disk(directory / "fault")
    yield disk
    disk.control.unlink(missing_ok=True)


@pytest.fixture
def account(http: httpx.Client, service: FaultyService) -> Account:
    account = Account(http, service.url, f"bn-{uuid4()}")
    account.prepare()
    return account


def changes(account: Account) -> list[Callable[[], httpx.Response]]:
    return [lambda: account.send(4), lambda: account.send_pin("new"), lambda: account.rollback("early")]


@pytest.mark.parametrize("fault", ["e", "n"])
def test_nothing_is_acknowledged_that_the_disk_refused(account: Account, disk: Disk, fault: str) -> None:
    before = account.check()
    disk.fails(fault)
    for change in changes(account):
        refused = change()
        assert (refused.status_code, refused.json()["type"]) == (503, "/problems/store-unavailable")
        assert "Retry-After" in refused.headers
    assert account.check() == before, "reads go on, and show what is committed"
    disk.works()
    assert account.check() == before
    account.repeat(4, replay=False)
    account.pin("new")
    assert "Idempotent-Replay" not in account.rollback("early").raise_for_status().headers
    account.count_rollback("early")
    account.train(5)
    account.check()


@pytest.mark.parametrize("fault", ["e", "n"])
@pytest.mark.parametrize("number", range(3))
def test_a_service_that_is_killed_after_a_refusal(
    account: Account, service: FaultyService, disk: Disk, fault: str, number: int
) -> None:
    """The log may have the whole change, although its flush failed: it is there or not, and a repeat finds out."""
    before = account.check()
    disk.fails(fault)
    assert changes(account)[number]().status_code == 503
    disk.works()
    service.kill_at(0)
    with pytest.raises(httpx.TransportError):
        account.create()
    service.died_at()
    repeat = changes(account)[number]()
    _count(account, number)
    assert repeat.status_code in {200, 201}
    account.train(5)
    after = account.check()
    for at in ("early", before["layer"]["version"]):
        assert after[f"state {at}"] == before[f"state {at}"]


@pytest.mark.parametrize("fault", ["b", "a", "t"])
@pytest.mark.parametrize("number", range(3))
def test_a_service_that_dies_in_a_flush_or_a_write(
    account: Account, service: FaultyService, disk: Disk, fault: str, number: int
) -> None:
    before = account.check()
    disk.fails(fault)
    with pytest.raises(httpx.TransportError):
        changes(account)[number]()
    assert disk.died
    service.wait()
    repeat = changes(account)[number]()
    _count(account, number)
    assert repeat.status_code in {200, 201}
    if fault == "t":  # the log ends within the change
        assert "Idempotent-Replay" not in repeat.headers
    account.train(5)
    after = account.check()
    for at in ("early", before["layer"]["version"]):
        assert after[f"state {at}"] == before[f"state {at}"]


def _count(account: Account, number: int) -> None:
    if number == 0:
        account.count(4)
    elif number == 1:
        account.pinned["new"] = account.expected
    else:
        account.count_rollback("early")
