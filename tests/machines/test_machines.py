"""State machines over `Layers` and over HTTP: see docs/testing.md. `make machines` runs them for longer."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import rule, run_state_machine_as_test

from batchnorm_service.store.memory import MemoryStore
from batchnorm_service.store.sqlite.store import SqliteStore
from machines.calls import Calls, DirectCalls, HttpCalls
from machines.faults import FAULTS
from machines.machine import Machine

EXAMPLES = int(os.environ.get("BATCHNORM_TEST_MACHINES", "0"))


class InMemory(Machine):
    def make_calls(self) -> Calls:
        return DirectCalls(MemoryStore)


class InSqlite(Machine):
    """Layers in a file, which may be closed and opened again."""

    def make_calls(self) -> Calls:
        self.folder = tempfile.TemporaryDirectory()
        return DirectCalls(lambda: SqliteStore(Path(self.folder.name) / "layers.db"))

    @rule()
    def restart(self) -> None:
        self.run(self.calls.close())
        self.run(self.calls.open())

    def teardown(self) -> None:
        super().teardown()
        self.folder.cleanup()


class ByAsgi(Machine):
    def make_calls(self) -> Calls:
        return HttpCalls("asgi")


class ByTheFastPath(Machine):
    uvloop = True

    def make_calls(self) -> Calls:
        return HttpCalls("fast path")


def run(machine: type[Machine], examples: int) -> None:
    """Raise what the first failing example raises. Only a long run shortens it, which may take minutes."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES or examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=not EXAMPLES,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, *([Phase.shrink] if EXAMPLES else [])],
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(0 if EXAMPLES else 120)
@pytest.mark.parametrize(("machine", "examples"), [(InMemory, 40), (InSqlite, 15), (ByAsgi, 15), (ByTheFastPath, 10)])
def test_a_layer_is_torchs_module(machine: type[Machine], examples: int) -> None:
    run(machine, examples)


@pytest.mark.slow
@pytest.mark.skipif(EXAMPLES > 0, reason="found in the short run already")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    """The proof that a machine can fail."""
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises(AssertionError):
            run(InMemory, 100)
