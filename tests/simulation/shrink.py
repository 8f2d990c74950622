"""The shortest script that still fails: steps, clients and kinds of faults are left out as long as a finding stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from simulation.operations import Script
from simulation.world import Plan, World


def shrunk(plan: Plan) -> World:
    """A failing world of as few steps as could be found.

    Which callback comes next depends on all that came before, so a shorter script is another world: each is tried with
    a few seeds.
    """
    best = World(plan).run()
    going = True
    while going:
        going = False
        for smaller in _smaller(best.plan):
            if (world := _failing(smaller)) is not None:
                best, going = world, True
                break
    return best


def _failing(plan: Plan) -> World | None:
    for seed in (plan.seed, *range(5)):
        world = World(replace(plan, seed=seed)).run()
        if world.findings:
            return world
    return None


def _smaller(plan: Plan) -> Iterator[Plan]:
    for size in (8, 4, 2, 1):
        for scripts in _shorter(plan.scripts, size):
            yield replace(plan, scripts=scripts)
        for followers in _shorter(plan.followers, size):
            yield replace(plan, followers=followers)
    for fault in fields(plan.faults):
        if getattr(plan.faults, fault.name) and fault.name not in ("latency", "sync"):
            yield replace(plan, faults=replace(plan.faults, **{fault.name: 0.0}))


def _shorter(scripts: list[Script], size: int) -> Iterator[list[Script]]:
    for number, script in enumerate(scripts):
        for start in range(0, len(script.steps), size):
            steps = script.steps[:start] + script.steps[start + size :]
            yield [Script(steps) if n == number else one for n, one in enumerate(scripts)]
