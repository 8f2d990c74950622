"""Which server has which bucket, and the connections to each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from batchnorm_service.store.base import StoreRefusedError
from batchnorm_service.store.valkey.address import Node
from batchnorm_service.store.valkey.connection import FAULTS, Connector, ServerConnection, in_words
from batchnorm_service.store.valkey.keys import BUCKET_SLOTS, BUCKETS
from batchnorm_service.store.valkey.pipeline import Pipeline, UnsentError

_log = logging.getLogger(__name__)

_ASK_SECONDS: Final = 1.0  # for the way of the slots, from one node; then another is asked
_REST_SECONDS: Final = 0.1  # between two times that the cluster is asked


class ClusterTopology:
    """The servers.

    valkey-py's cluster client is not used: it repeats commands by itself, gives connections back that were cancelled
    in the middle of an answer, and does not show which connection a WAIT would have to follow on. Its connections and
    its parser are.

    Args:
        connector: connects.
        pipeline: makes a pipeline to a node.
        connections: how many pipelines a node gets.
        split: reads of single records get pipelines of their own, where they do not stand behind a WAIT.
    """

    def __init__(
        self, connector: Connector, pipeline: Callable[[Node], Pipeline], connections: int, *, split: bool
    ) -> None:
        self._connector = connector
        self._make = pipeline
        self._connections = connections
        self._split = split
        seeds = connector.address.nodes
        self._cluster = connector.address.cluster
        self._known: tuple[Node, ...] = seeds
        self._owners: list[Node | None] = [None if self._cluster else seeds[0]] * BUCKETS
        self._pipelines: dict[tuple[Node, int, bool], Pipeline] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed = -_REST_SECONDS
        self._closing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Find the owners, and see that each can be used. Raises `StoreRefusedError` with the reason in words."""
        if self._cluster:
            connection = await self._first_answer()
            try:
                await self._learn(connection)
            except FAULTS as error:
                raise StoreRefusedError(f"the cluster does not say where its slots are: {in_words(error)}") from error
            finally:
                await connection.drop()
            if None in self._owners:
                raise StoreRefusedError("some hash slots of the cluster have no owner; wait for it or repair it")
        for node in self.owners():
            connection = await self._connector.connect(node)
            if not connection.keeps:
                _log.warning("%s has no append-only file: what is acknowledged is lost when it stops", node)
            await connection.close()

    async def close(self) -> None:
        """Finish what was begun, and disconnect."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        pipelines = [pipeline.close() for pipeline in self._pipelines.values()]
        await asyncio.gather(*pipelines, *self._closing, *filter(None, [self._refreshing]), return_exceptions=True)

    def owners(self) -> list[Node]:
        """The servers that have buckets."""
        return list(dict.fromkeys(owner for owner in self._owners if owner is not None))

    def sample(self) -> list[int]:
        """One bucket of every server that has any."""
        return list({owner: bucket for bucket, owner in enumerate(self._owners)}.values())

    def owner(self, bucket: int) -> Node | None:
        """The server that has a bucket, as far as is known."""
        return self._owners[bucket]

    def pipeline(self, bucket: int, key: bytes, *, reading: bool, node: Node | None = None) -> Pipeline:
        """Where a job goes. A read of `key` never overtakes a write of it that was queued before.

        Raises:
            UnsentError: nobody is known to own the bucket.
        """
        node = node or self._owners[bucket]
        if node is None:
            raise UnsentError("no server of the cluster owns the hash slot")
        number = bucket % self._connections
        pipeline = self._pipeline(node, number, reading=False)
        if reading and self._split and not pipeline.writing(key):
            return self._pipeline(node, number, reading=True)
        return pipeline

    def moved(self, bucket: int, node: Node) -> None:
        """Note what a redirection said; there may be more to learn."""
        self._owners[bucket] = node
        self.suspect()

    def suspect(self) -> None:
        """Something is not where it was: ask the cluster, without waiting for what it says."""
        if self._cluster and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = self._connector.runtime.create_task(self._refresh())

    async def refresh(self) -> None:
        """Ask the cluster, and wait for what it says. No answer is no error: all stays as it is known."""
        self.suspect()
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])

    def _pipeline(self, node: Node, number: int, *, reading: bool) -> Pipeline:
        key = (node, number, reading)
        if key not in self._pipelines:
            self._pipelines[key] = self._make(node)
        return self._pipelines[key]

    async def _refresh(self) -> None:
        runtime = self._connector.runtime
        await runtime.sleep(self._refreshed + _REST_SECONDS - runtime.now())
        for node in sorted(self._known, key=lambda _: runtime.bits(32)):
            with contextlib.suppress(StoreRefusedError, *FAULTS):
                async with runtime.timeout(_ASK_SECONDS):
                    connection = await self._connector.connect(node)
                    try:
                        await self._learn(connection)
                        break
                    finally:
                        await connection.drop()
        self._refreshed = runtime.now()
        self._retire()

    async def _first_answer(self) -> ServerConnection:
        fault = StoreRefusedError("")
        for node in self._known:
            try:
                return await self._connector.connect(node)
            except StoreRefusedError as error:
                fault = error
        raise fault

    async def _learn(self, connection: ServerConnection) -> None:
        await connection.send([(b"CLUSTER", b"SLOTS")])
        async with self._connector.runtime.timeout(self._connector.timeout):
            ranges = await connection.reply()
        owners: list[Node | None] = [None] * BUCKETS
        known: dict[Node, None] = {}
        for first, last, *nodes in ranges:
            servers = list(_nodes(nodes, connection.node))
            known |= dict.fromkeys(servers)
            for bucket, slot in enumerate(BUCKET_SLOTS):
                if first <= slot <= last and servers:
                    owners[bucket] = servers[0]
        if not known:
            return
        self._owners = owners
        # The seeds too: behind a name of several nodes there is always one, even when all that were known are gone.
        self._known = tuple(known | dict.fromkeys(self._connector.address.nodes))

    def _retire(self) -> None:
        """Close the connections to servers that have left."""
        for key in [key for key in self._pipelines if key[0] not in self._known]:
            task = self._connector.runtime.create_task(self._pipelines.pop(key).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _nodes(entries: Sequence[Any], asked: Node) -> Iterator[Node]:
    """The servers of a range of slots, the primary first; one that does not know its own name is the one asked."""
    for position, (host, port, *_) in enumerate(entries):
        name = host.decode() if host else ""
        if name not in {"", "?"}:
            yield Node(name, port)
        elif position == 0:
            yield Node(asked.host, port)
