"""What every test shares."""

import gc

import pytest
import torch

torch.set_num_threads(1)  # as the service does: torch rounds sums in an order that depends on it

_measured = pytest.StashKey[list[str]]()


@pytest.fixture
def anyio_backend() -> str:
    """Coroutines run on asyncio, the only loop that uvicorn and the stores know."""
    return "asyncio"


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> list[str]:
    """Lines that a test wants printed at the end of the run: what it measured."""
    return pytestconfig.stash.setdefault(_measured, [])


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
