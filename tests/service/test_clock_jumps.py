"""The wall clock jumps: batches count once, pins and history stay, and receipts expire by that clock."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import httpx
import pytest

from .account import Account
from .faulty import FaultyService

pytestmark = pytest.mark.slow

HOUR, YEAR = 3600.0, 31_536_000.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyService]:
    directory = tmp_path_factory.mktemp("clock")
    service = FaultyService(directory, f"sqlite:///{directory}/layers.db")
    yield service
    assert service.process.stop() == 0
    service.process.close()


@pytest.fixture
def account(http: httpx.Client, service: FaultyService) -> Account:
    service.set_clock(0)
    account = Account(http, service.url, f"bn-{uuid4()}")
    account.prepare()
    return account


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
@pytest.mark.parametrize("jump", [HOUR / 2, -HOUR / 2, -YEAR])
def test_a_jump_and_back(account: Account, service: FaultyService, jump: float, restart: bool) -> None:
    before = account.check()
    service.set_clock(jump)
    if restart:
        service.kill_at(0)
        with pytest.raises(httpx.TransportError):
            account.create()
        service.died_at()
    assert account.check() == before
    for seed in (1, 2, 3):
        account.repeat(seed, replay=True)
    assert account.send_pin("early").status_code == 200
    account.train(4)
    kept = len(account.check()["history"])
    account.train(5)
    assert kept > len(before["history"]), "the first batch after a jump has its state kept"
    assert account.rollback("early").status_code == 200
    account.count_rollback("early")
    service.set_clock(0)
    known = jump > -HOUR  # receipts that were written a year ago have expired
    for seed in (4, 5):
        account.repeat(seed, replay=known)
    assert ("Idempotent-Replay" in account.rollback("early").headers) == known
    if not known:
        account.count_rollback("early")
    account.train(6)
    account.check()


def test_a_jump_ahead_of_the_receipts_time(account: Account, service: FaultyService) -> None:
    """They have expired by the service's clock, so a repeat counts; pins are as they were."""
    before = account.check()
    service.set_clock(2 * HOUR)
    account.repeat(1, replay=False)
    account.repeat(1, replay=True)
    service.set_clock(0)
    account.repeat(1, replay=True)
    account.repeat(2, replay=False)
    after = account.check()
    assert after["pins"] == before["pins"]
    assert after["state early"] == before["state early"]
