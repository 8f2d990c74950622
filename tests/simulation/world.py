"""A simulated world: clients, replicas, network and store, on one seeded event loop."""

from __future__ import annotations

import asyncio
import gc
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any

from simulation import loop, observations, oracle, waits
from simulation.clients import make_client
from simulation.faults import Faults
from simulation.followers import Followers
from simulation.network import Connections
from simulation.operations import Operation, Script
from simulation.replica import Replica
from simulation.runtimes import ClientRuntime, ServiceRuntime
from simulation.store import Server
from simulation.workload import (
    TRAIN_AND_READ,
    TRAIN_AND_WAIT,
    TRAIN_BESIDE,
    Caller,
    draw_configs,
    draw_followers,
    draw_scripts,
)

LENGTH = 40
"""Steps of all clients together."""

LONGEST = 3600.0
"""Seconds of the world's time after which something hangs."""

RECEIPT_SECONDS = 24 * 3600.0


@dataclass
class Plan:
    """What happens in a world, as far as it is drawn beforehand.

    Attributes:
        seed: of everything else: latencies, order of callbacks, which messages are lost.
        faults: how often what goes wrong.
        configs: of the layers.
        scripts: of the clients.
        replicas: how many; 1 has an embedded store.
        threaded: whether that store works in a thread, as SQLite's does.
        followers: what processes with followers do.
    """

    seed: int
    faults: Faults
    configs: dict[str, dict[str, Any]]
    scripts: list[Script]
    replicas: int
    threaded: bool
    followers: list[Script] = field(default_factory=list)

    @classmethod
    def draw(cls, seed: int, length: int = LENGTH) -> Plan:
        """The plan of a seed.

        In most worlds everything may happen. In some, clients do nothing but train and read: one layer while the store
        crashes, or two layers, of which one fits in the cache, while nothing goes wrong; or they wait for new states,
        or there are followers.
        """
        random = Random(seed)
        configs = draw_configs(random)
        match random.random():
            case chance if chance < 0.2:
                configs = {"a": configs["a"]}
                scripts = draw_scripts(random, ["a"], length, TRAIN_AND_READ)
                return cls(seed, Faults.crashes(random), configs, scripts, random.choice((2, 3)), threaded=False)
            case chance if chance < 0.3:
                configs = dict.fromkeys("ab", configs["a"])
                scripts = draw_scripts(random, list("ab"), 2 * length, TRAIN_AND_READ, busy=True)
                return cls(seed, Faults.none(random), configs, scripts, replicas=1, threaded=random.random() < 0.5)
            case chance if chance < 0.4:
                configs = dict.fromkeys("abcdef", configs["a"])
                scripts = draw_scripts(random, list("abcdef"), length, TRAIN_AND_WAIT)
                far = replace(Faults.none(random), latency=0.005, store_distance=random.choice((1.0, 5.0)))
                return cls(seed, far, configs, scripts, random.choice((1, 1, 2)), threaded=False)
            case chance if chance < 0.55:
                configs = {name: configs[name] for name in list(configs)[:2]}
                scripts = draw_scripts(random, list(configs), length // 4, TRAIN_BESIDE)
                followers = draw_followers(random, list(configs), length // 4)
                faults, replicas = Faults.draw(random), random.choice((1, 2, 3))
                if random.random() < 0.25:
                    faults = Faults.none(random)
                    scripts = draw_scripts(random, list(configs), length // 4, TRAIN_AND_READ)
                threaded = replicas == 1 and random.random() < 0.5
                return cls(seed, faults, configs, scripts, replicas, threaded, followers)
        faults = Faults.draw(random)
        replicas = random.choice((1, 1, 2, 3))
        scripts = draw_scripts(random, list(configs), length)
        return cls(seed, faults, configs, scripts, replicas, replicas == 1 and random.random() < 0.5)


@dataclass
class World:
    """A world that was run.

    Attributes:
        plan: what it was made from.
        operations: what clients saw, in the order in which calls began.
        server: with all that was written.
        history_length: how many states of a layer the replicas keep without a pin.
        findings: what broke a promise; empty if nothing did.
        events: what went wrong, for the trace.
        followers: with what they saw and sent.
    """

    plan: Plan
    operations: list[Operation] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    server: Server = field(init=False)
    history_length: int = field(init=False)
    followers: Followers = field(init=False)

    def run(self) -> World:
        """Run it to its end and check its history."""
        collect_garbage()
        random = Random(f"{self.plan.seed} world")
        try:
            loop.run(random, lambda: self._live(random))
        except loop.DeadlockError as error:
            self.findings.append(str(error))
        self.findings += observations.findings(self.followers.processes, self.server, self.plan.faults)
        self.findings += waits.findings(self.operations, self.server, self.plan.faults)
        self.findings += oracle.check(
            self.operations,
            self.server,
            self.history_length,
            requests_come_twice=self.plan.faults.request_twice > 0,
        )
        return self

    async def _live(self, random: Random) -> None:
        plan = self.plan
        exclusive = plan.replicas == 1
        calm = replace(plan.faults, failover=0.0, crash_after_write=0.0, store_away=0.0)
        faults = calm if exclusive else plan.faults  # an embedded store dies with its process
        keeping = {"history_length": random.choice((0, 1, 3, 20)), "history_seconds": random.choice((0.0, 0.1, 60.0))}
        self.history_length = keeping["history_length"]
        self.server = Server(random, faults, RECEIPT_SECONDS, ServiceRuntime(random), embedded=exclusive)
        replicas = [
            Replica(f"replica {n}", self.server, random, faults, exclusive=exclusive, threaded=plan.threaded, **keeping)
            for n in range(plan.replicas)
        ]
        for one in replicas:
            await one.start()
        client = make_client(Connections(replicas, random, faults), ClientRuntime(random))
        self.followers = Followers(self.operations, replicas, random, faults)
        caller = Caller(client, plan.configs, self.operations, random, faults)
        first = Script([(0.0, "create", name, {}) for name in plan.configs])
        trouble = [
            asyncio.ensure_future(self._every(random, faults.kill, lambda: self._kill(random, replicas))),
            asyncio.ensure_future(self._every(random, faults.failover, self._fail_over)),
            asyncio.ensure_future(self._every(random, faults.store_away, lambda: self._store_away(random))),
            asyncio.ensure_future(self._every(random, faults.clock_jump, lambda: self._jump(random, replicas))),
        ]
        created = asyncio.ensure_future(caller.carry_out(first))
        work = asyncio.gather(
            created,
            *(caller.carry_out(script) for script in plan.scripts),
            *(self.followers.carry_out(script, created) for script in plan.followers),
        )
        try:
            async with asyncio.timeout(LONGEST):
                await work
        except TimeoutError:
            self.findings.append("a call hangs")
        for one in trouble:
            one.cancel()
        for one in replicas:
            one.stop()

    async def _every(self, random: Random, mean: float, happen: Any) -> None:
        while mean:
            await asyncio.sleep(random.expovariate(1 / mean))
            await happen()

    def _note(self, what: str) -> None:
        self.events.append((asyncio.get_running_loop().time(), what))

    async def _kill(self, random: Random, replicas: list[Replica]) -> None:
        one = random.choice(replicas)
        if one.serving:
            self._note(f"{one.name} is killed")
            one.kill()
            await asyncio.sleep(random.expovariate(5))
            await one.start()
            self._note(f"{one.name} is back")

    async def _fail_over(self) -> None:
        self._note("the store crashes")
        self.server.crash()

    async def _store_away(self, random: Random) -> None:
        self._note("the store is away")
        self.server.away = True
        await asyncio.sleep(random.expovariate(0.5))
        self.server.away = False
        self._note("the store is back")

    async def _jump(self, random: Random, replicas: list[Replica]) -> None:
        random.choice(replicas).runtime.skew += random.uniform(-600, 600)


@cache
def _freeze() -> None:
    """What was imported is not looked at again."""
    gc.collect()
    gc.freeze()


def collect_garbage() -> None:
    """Of the worlds before, while no loop runs. Coroutines that cannot end there are of no interest."""
    _freeze()
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook
