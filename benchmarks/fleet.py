"""A queueing model of a whole fleet: how many replicas and shards a load takes, what breaks first, and what helps.

Replicas and shards are servers with one core each, calls come at random (M/M/1 per core), layers are independent but
for the hottest one, which is a queue with bulk service: one commit folds all that waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

BUSY = 0.6
"""How busy a core may be: an M/M/1 queue then takes 2.5 times the bare service time."""
MOST_SHARDS = 256  # buckets of the store's layout
MOST_CLIENTS = 10_000  # Valkey's default maxclients
CONNECTIONS = 2
RECEIPT_SECONDS = 3600


class Measured(NamedTuple):
    """What the model is fitted to; seconds are of a core.

    Attributes:
        replica_train: of a replica, for a train call over HTTP.
        replica_eval: of a replica, for an eval call.
        shard_train: of a Valkey server, for a train call.
        shard_eval: of a Valkey server, for an eval's check.
        commit: from one commit of a layer to the next, however many folds it has.
        fold: for each fold in it.
        rival: tries that each further replica adds to a commit.
        receipt: bytes of memory in the store.
        layer: bytes of memory in the store.
        body: bytes of a batch.
    """

    replica_train: float
    replica_eval: float
    shard_train: float
    shard_eval: float
    commit: float
    fold: float
    rival: float
    receipt: float
    layer: float
    body: int


class Load(NamedTuple):
    """What is asked for, per second."""

    train: float = 1e6
    eval: float = 10e6
    layers: float = 1e6


def hottest_share(layers: float) -> float:
    """The share of the most used layer when use falls as 1/rank (Zipf)."""
    return 1 / (math.log(layers) + 0.5772)


def fleet(measured: Measured, load: Load) -> Iterator[str]:
    """What the load takes, as lines of a table, and what breaks first."""
    replicas = math.ceil((load.train * measured.replica_train + load.eval * measured.replica_eval) / BUSY)
    shards = math.ceil((load.train * measured.shard_train + load.eval * measured.shard_eval) / BUSY)
    receipts = load.train * RECEIPT_SECONDS * measured.receipt
    memory = receipts + load.layers * measured.layer
    per_layer = load.train / load.layers
    conflicts = per_layer * (measured.commit + measured.fold)
    most = 1 / measured.fold
    hot = load.train * hottest_share(load.layers)
    clients = replicas * CONNECTIONS
    network = (load.train + load.eval) * measured.body * 2
    yield "| what | figure | limit | holds |"
    yield "|---|---|---|---|"
    for what, figure, limit, holds in (
        ("replica cores", f"{replicas:,}", "add machines", True),
        ("shards (Valkey primaries)", f"{shards:,}", f"{MOST_SHARDS} buckets", shards <= MOST_SHARDS),
        ("connections to each shard", f"{clients:,}", f"maxclients {MOST_CLIENTS:,}", clients <= MOST_CLIENTS),
        ("memory of all shards", f"{memory / 1e9:,.0f} GB", "64 GB a shard", memory <= shards * 64e9),
        ("of that, receipts", f"{receipts / 1e9:,.0f} GB", "", True),
        ("batches in and out of replicas", f"{8 * network / 1e9:,.0f} Gbit/s", "10 Gbit/s for 8 cores",
         8 * network / 10e9 <= replicas / 8),
        ("races lost per commit, uniform layers", f"{conflicts:.2%}", "", conflicts < 0.1),
        ("train calls/s on the hottest layer, uniform", f"{per_layer:,.0f}", f"{most:,.0f}", per_layer <= most),
        ("the same, Zipf", f"{hot:,.0f}", f"{most:,.0f}", hot <= most),
    ):  # fmt: skip
        yield f"| {what} | {figure} | {limit} | {'yes' if holds else '**no**'} |"


def time_in_queue(service: float, busy: float = BUSY) -> float:
    """Seconds that a call takes at a core that is so busy (M/M/1)."""
    return service / (1 - busy)


def layer_rate(measured: Measured, waiting: float) -> float:
    """Folds per second on one layer while so many calls wait (bulk service)."""
    return waiting / (measured.commit + measured.fold * waiting)
