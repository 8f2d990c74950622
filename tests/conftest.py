"""What every test shares."""

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the tests measured."""
    for line in config.stash.get(_measured, []):
        terminalreporter.write_line(line)
