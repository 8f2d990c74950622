"""How often what goes wrong in a world; drawn from its seed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities of each message, and mean seconds between what happens to processes.

    Attributes:
        latency: mean seconds of a message's way between client and replica.
        store_distance: how much farther the store is from a replica.
        request_lost, response_lost, request_twice: of a request between client and replica.
        store_request_lost, store_reply_lost, store_late: of a call of the store; a late one arrives after its caller
            has given up.
        slow: of messages that take thirty times as long.
        crash_after_write: of writes, after which the store crashes before they are durable.
        disk_full: a write fails.
        gives_up: a caller cancels its call.
        kill: between kills of a replica; 0 for none.
        failover: between crashes of the store, which may lose writes that were not synced; 0 for none.
        store_away: between times when the store does not answer; 0 for none.
        clock_jump: between jumps of a replica's wall clock; 0 for none.
        sync: mean seconds until a write of the store is durable.
    """

    latency: float
    store_distance: float
    request_lost: float
    response_lost: float
    request_twice: float
    store_request_lost: float
    store_reply_lost: float
    store_late: float
    slow: float
    crash_after_write: float
    disk_full: float
    gives_up: float
    kill: float
    failover: float
    store_away: float
    clock_jump: float
    sync: float

    @property
    def are_none(self) -> bool:
        """Whether nothing goes wrong: messages and disks take their time, and that is all."""
        times = {"latency", "store_distance", "sync"}
        return not any(getattr(self, field.name) for field in fields(self) if field.name not in times)

    def way(self, random: Random) -> float:
        """Seconds of a message's way between client and replica."""
        return random.expovariate(1 / self.latency) * (30 if random.random() < self.slow else 1)

    def store_way(self, random: Random) -> float:
        """Seconds of a message's way between replica and store."""
        return self.store_distance * self.way(random)

    @classmethod
    def crashes(cls, random: Random) -> Faults:
        """The store crashes again and again before its newest writes are durable; little else goes wrong."""
        calm = dict.fromkeys((field.name for field in fields(cls)), 0.0)
        return cls(
            **calm
            | {
                "latency": random.choice((0.005, 0.05)),
                "store_distance": random.choice((0.2, 5.0)),
                "crash_after_write": random.uniform(0.1, 0.5),
                "kill": random.choice((0.3, 1.0)),
                "sync": random.choice((0.05, 0.3)),
            }
        )

    @classmethod
    def none(cls, random: Random) -> Faults:
        """Nothing goes wrong; messages and disks take their time."""
        calm = dict.fromkeys((field.name for field in fields(cls)), 0.0)
        times = {"latency": random.choice((0.0005, 0.005)), "store_distance": 0.2, "sync": random.choice((0.001, 0.02))}
        return cls(**calm | times)

    @classmethod
    def draw(cls, random: Random) -> Faults:
        """Each kind is there in about half of all worlds, so that few hide others."""

        def chance(most: float) -> float:
            return random.uniform(0, most) if random.random() < 0.5 else 0.0

        def every(least: float, most: float) -> float:
            return random.uniform(least, most) if random.random() < 0.5 else 0.0

        return cls(
            latency=random.choice((0.0005, 0.005, 0.05)),
            store_distance=random.choice((0.2, 5.0)),
            request_lost=chance(0.1),
            response_lost=chance(0.2),
            request_twice=chance(0.2),
            store_request_lost=chance(0.1),
            store_reply_lost=chance(0.2),
            store_late=chance(0.1),
            slow=chance(0.4),
            crash_after_write=chance(0.3),
            disk_full=chance(0.1),
            gives_up=chance(0.15),
            kill=every(0.3, 5),
            failover=every(0.3, 5),
            store_away=every(1, 10),
            clock_jump=every(1, 5),
            sync=random.choice((0.0, 0.001, 0.02, 0.3, 0.3)),
        )
