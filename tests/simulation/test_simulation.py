"""The simulated world in short: `make simulate` runs as many seeds as wanted, `make mutants` all mutants to the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

import pytest

from simulation.mutants import MUTANTS, planted
from simulation.shrink import shrunk
from simulation.world import Plan, World, collect_garbage

pytestmark = pytest.mark.slow
SEEDS, CHUNK = 500, 25


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Stores that do not answer are logged, thousands of times; what worlds leave behind would be reported later."""
    caplog.set_level(logging.CRITICAL)
    yield
    collect_garbage()


@pytest.mark.filterwarnings("ignore")  # killed processes leave coroutines that were never awaited to their end
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_promise_is_broken(first: int) -> None:
    for seed in range(first, first + CHUNK):
        assert World(Plan.draw(seed)).run().findings == [], f"make simulate SEED={seed}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("replicas", "threaded"), [(1, False), (1, True), (2, False), (3, False)])
def test_most_calls_succeed(replicas: int, threaded: bool) -> None:
    """A world in which nothing succeeds breaks no promise: its checker would check nothing."""
    plans = (Plan.draw(seed) for seed in range(200))
    chosen = (plan for plan in plans if (plan.replicas, plan.threaded) == (replicas, threaded))
    worlds = [World(plan).run() for plan in islice(chosen, 8)]
    operations = [one for world in worlds for one in world.operations if one.kind in ("train", "eval", "inspect")]
    assert len(operations) > 80
    assert sum(one.acknowledged for one in operations) > len(operations) / 2


@pytest.mark.filterwarnings("ignore")
def test_most_calls_of_followers_succeed() -> None:
    worlds = [World(plan).run() for plan in islice((plan for plan in map(Plan.draw, range(200)) if plan.followers), 8)]
    operations = [one for world in worlds for one in world.operations if one.kind.startswith("follower.")]
    assert len(operations) > 150
    assert sum(one.acknowledged for one in operations) > len(operations) / 2
    assert any(process.frames for world in worlds for process in world.followers.processes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [3, 5, 8, 14, 18, 27])
def test_a_seed_is_always_the_same_world(seed: int) -> None:
    first, second = (World(Plan.draw(seed)).run() for _ in range(2))
    assert [str(one) for one in first.operations] == [str(one) for one in second.operations]
    assert [(one.at, one.name, one.receipts) for one in first.server.log] == [
        (one.at, one.name, one.receipts) for one in second.server.log
    ]
    assert first.events == second.events


@pytest.mark.filterwarnings("ignore")
def test_a_seed_of_those_has_followers() -> None:
    assert Plan.draw(14).followers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_fault_is_found(mutant: str) -> None:
    with planted(mutant):
        assert any(World(Plan.draw(seed)).run().findings for seed in range(200))


@pytest.mark.filterwarnings("ignore")
def test_a_failing_world_is_made_shorter() -> None:
    with planted("a duplicate is folded again"):
        failing = next(world for seed in range(200) if (world := World(Plan.draw(seed)).run()).findings)
        shortest = shrunk(failing.plan)
    assert shortest.findings
    steps = [sum(len(script.steps) for script in world.plan.scripts) for world in (failing, shortest)]
    assert steps[1] <= 4 < steps[0]
