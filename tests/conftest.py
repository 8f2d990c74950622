"""What every test shares."""

import gc
from functools import cache
from itertools import chain
from types import FunctionType

import httpx
import pytest
import torch

torch.set_num_threads(1)  # as the service does: torch rounds sums in an order that depends on it
httpx._transports.default.create_ssl_context = cache(httpx.create_ssl_context)  # else each `httpx.get` takes 50 ms

_measured = pytest.StashKey[list[str]]()

PROCESS_FIXTURES = {
    *("guarded_url", "own", "pair", "plain", "server", "start", "stormy", "upgrading", "url"),
    *("valkey", "valkey_cluster", "valkey_server"),
}
PROCESS_FUNCTIONS = {"child", "command", "subprocess"}
"""What starts processes. A test that uses it, by itself or in a function of its module, is marked as slow."""


@pytest.fixture
def anyio_backend() -> str:
    """Coroutines run on asyncio, the only loop that uvicorn and the stores know."""
    return "asyncio"


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> list[str]:
    """Lines that a test wants printed at the end of the run: what it measured."""
    return pytestconfig.stash.setdefault(_measured, [])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start processes as slow, which `make test-quick` leaves out."""
    for item in items:
        if isinstance(item, pytest.Function) and _starts_processes(item):
            item.add_marker("slow")


def _starts_processes(item: pytest.Function) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    store = parameters.get("table", parameters.get("make_store", ""))
    if store.startswith("valkey") or not PROCESS_FIXTURES.isdisjoint({*item.fixturenames} - parameters.keys()):
        return True
    names = item.function.__code__.co_names
    helpers = [vars(item.module).get(name) for name in names]
    called = [helper.__code__.co_names for helper in helpers if isinstance(helper, FunctionType)]
    return not PROCESS_FUNCTIONS.isdisjoint(chain(names, *called))


def pytest_collection_finish() -> None:
    """Let the collector of garbage pass over what was imported and collected: it took a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what the tests of this process measured to the process that prints it, where that is another."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["measured"] = session.config.stash.get(_measured, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Take what the tests of another process measured."""
    node.config.stash.setdefault(_measured, []).extend(getattr(node, "workeroutput", {}).get("measured", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the tests measured."""
    for line in config.stash.get(_measured, []):
        terminalreporter.write_line(line)
