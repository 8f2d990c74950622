"""`python -m simulation.run`: many simulated worlds, on all cores; `make simulate` and `make mutants` call it."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator

import torch

from simulation.mutants import MUTANTS, planted
from simulation.shrink import shrunk
from simulation.world import Plan, World

_CHUNK = 20
_REPORT = 5000
"""A line is printed after so many seeds, where nobody looks at a terminal."""

_MOST_SEEDS = 200
"""Within which a mutant must be found."""


def _prepare() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")  # killed processes leave coroutines that were never awaited to their end
    sys.unraisablehook = lambda _: None  # the same
    torch.set_num_threads(1)


def _failing(first: int) -> list[tuple[int, list[str]]]:
    worlds = (World(Plan.draw(seed)).run() for seed in range(first, first + _CHUNK))
    return [(world.plan.seed, world.findings) for world in worlds if world.findings]


def _seeds_until_found(mutant: str) -> tuple[str, int | None]:
    with planted(mutant):
        for seed in range(_MOST_SEEDS):
            if World(Plan.draw(seed)).run().findings:
                return mutant, seed + 1
    return mutant, None


def _workers() -> multiprocessing.pool.Pool:
    return multiprocessing.get_context("spawn").Pool(os.cpu_count(), _prepare)


def simulate(first: int, count: int) -> int:
    """Run worlds, and print those that fail as they come. Returns the exit status."""
    began, faults, done = time.monotonic(), 0, 0
    chunks = range(first, first + count, _CHUNK)
    with _workers() as pool:
        for found in pool.imap_unordered(_failing, chunks):
            done += 1
            for seed, findings in found:
                if seed < first + count:
                    faults += 1
                    print(f"seed {seed}: {findings[0]}\n    make simulate SEED={seed}", flush=True)
            if sys.stderr.isatty():
                print(f"\r{done * _CHUNK} of {count} seeds ", end="", file=sys.stderr)
            elif done * _CHUNK % _REPORT == 0:
                print(f"{done * _CHUNK} of {count} seeds, {faults} faults", flush=True)
    seconds = time.monotonic() - began
    print(f"{count} seeds from {first}, {faults} faults, {count / seconds:.1f} seeds/s")
    return 1 if faults else 0


def replay(seed: int) -> int:
    """Run one world, and print the shortest that still fails. Returns the exit status."""
    _prepare()
    world = World(Plan.draw(seed)).run()
    if not world.findings:
        print(f"seed {seed}: no fault")
        return 0
    shortest = shrunk(world.plan)
    print("\n".join(_story(shortest)))
    return 1


def _story(world: World) -> Iterator[str]:
    yield f"{world.plan.replicas} replicas, layers {world.plan.configs}, {world.plan.faults}"
    told = [(one.began, str(one)) for one in world.operations]
    told += [(at, f"{at:9.4f}               {what}") for at, what in world.events]
    for applied in world.server.log:
        version = "deleted" if applied.after is None else f"version {applied.after.stamp.version}"
        batches = [receipt.batch for receipt in applied.receipts]
        told.append((applied.at, f"{applied.at:9.4f}               store: {applied.name} {version}, batches {batches}"))
    yield from (line for _, line in sorted(told))
    yield from (f"FAULT {finding}" for finding in world.findings)


def mutants() -> int:
    """Plant each mutant, and print after how many seeds it was found. Returns the exit status."""
    survivors = 0
    with _workers() as pool:
        for name, seeds in pool.imap(_seeds_until_found, MUTANTS):
            survivors += seeds is None
            found = f"found after {seeds} seeds" if seeds else f"SURVIVES {_MOST_SEEDS} seeds"
            print(f"{name:60}{found}", flush=True)
    print(f"{len(MUTANTS)} mutants, {survivors} survive")
    return 1 if survivors else 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m simulation.run", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, help="run this one, and print the shortest history that fails")
    parser.add_argument("--mutants", action="store_true", help="plant faults, and tell how soon they are found")
    asked = parser.parse_args()
    if asked.mutants:
        return mutants()
    return simulate(asked.first, asked.seeds) if asked.seed is None else replay(asked.seed)


if __name__ == "__main__":
    sys.exit(main())
