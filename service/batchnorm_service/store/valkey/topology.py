"""The cluster's topology: the server that owns each bucket, and the pipelines to the servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from batchnorm_service.store.base import StoreRefusedError
from batchnorm_service.store.valkey.address import Node
from batchnorm_service.store.valkey.connection import FAULTS, Connector, ServerConnection, describe_error
from batchnorm_service.store.valkey.keys import BUCKET_SLOTS, BUCKETS
from batchnorm_service.store.valkey.pipeline import Pipeline, UnsentError

_log = logging.getLogger(__name__)

_REFRESH_TIMEOUT: Final = 1.0  # seconds to get the slots from one node, before trying another
_MIN_REFRESH_INTERVAL: Final = 0.1  # seconds between two refreshes


class ClusterTopology:
    """Owners of the buckets, and pipelines to them.

    valkey-py's connections and parser are used, but not its cluster client: that repeats commands by itself, reuses
    connections whose reply was cancelled halfway, and does not show which connection a WAIT has to be sent on.

    Args:
        connector: opens connections.
        pipeline: creates a pipeline to a node.
        connections: number of pipelines per node.
        split: whether reads of single records use separate pipelines, so that they need not wait for a WAIT.
    """

    def __init__(
        self, connector: Connector, pipeline: Callable[[Node], Pipeline], connections: int, *, split: bool
    ) -> None:
        self._connector = connector
        self._new_pipeline = pipeline
        self._connections = connections
        self._split = split
        seeds = connector.address.nodes
        self._cluster = connector.address.cluster
        self._known: tuple[Node, ...] = seeds
        self._owners: list[Node | None] = [None if self._cluster else seeds[0]] * BUCKETS
        self._pipelines: dict[tuple[Node, int, bool], Pipeline] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed = -_MIN_REFRESH_INTERVAL
        self._closing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Find the owners, and check that each is suitable. Raises `StoreRefusedError`."""
        if self._cluster:
            connection = await self._connect_any()
            try:
                await self._load_slots(connection)
            except FAULTS as error:
                raise StoreRefusedError(
                    f"the cluster does not say where its slots are: {describe_error(error)}"
                ) from error
            finally:
                await connection.drop()
            if None in self._owners:
                raise StoreRefusedError("some hash slots of the cluster have no owner; wait for it or repair it")
        for node in self.owners():
            connection = await self._connector.connect(node)
            if not connection.append_only:
                _log.warning("%s has no append-only file: what is acknowledged is lost when it stops", node)
            await connection.close()

    async def close(self) -> None:
        """Finish queued calls, and disconnect."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        pipelines = [pipeline.close() for pipeline in self._pipelines.values()]
        await asyncio.gather(*pipelines, *self._closing, *filter(None, [self._refreshing]), return_exceptions=True)

    def owners(self) -> list[Node]:
        """The servers that own buckets."""
        return list(dict.fromkeys(owner for owner in self._owners if owner is not None))

    def sample(self) -> list[int]:
        """One bucket of each server that owns any."""
        return list({owner: bucket for bucket, owner in enumerate(self._owners)}.values())

    def owner(self, bucket: int) -> Node | None:
        """The last known owner of a bucket."""
        return self._owners[bucket]

    def pipeline(self, bucket: int, key: bytes, *, reading: bool, node: Node | None = None) -> Pipeline:
        """The pipeline for a call. A read of `key` never overtakes a write of it that was queued before.

        Raises:
            UnsentError: the bucket has no known owner.
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
        """Set the new owner after a redirection, and refresh the others."""
        self._owners[bucket] = node
        self.schedule_refresh()

    def schedule_refresh(self) -> None:
        """Refresh the topology in the background."""
        if self._cluster and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = self._connector.runtime.create_task(self._refresh())

    async def refresh(self) -> None:
        """Refresh the topology, and wait for it. If no node responds, it stays unchanged."""
        self.schedule_refresh()
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])

    def _pipeline(self, node: Node, number: int, *, reading: bool) -> Pipeline:
        key = (node, number, reading)
        if key not in self._pipelines:
            self._pipelines[key] = self._new_pipeline(node)
        return self._pipelines[key]

    async def _refresh(self) -> None:
        runtime = self._connector.runtime
        await runtime.sleep(self._refreshed + _MIN_REFRESH_INTERVAL - runtime.now())
        for node in sorted(self._known, key=lambda _: runtime.bits(32)):
            with contextlib.suppress(StoreRefusedError, *FAULTS):
                async with runtime.timeout(_REFRESH_TIMEOUT):
                    connection = await self._connector.connect(node)
                    try:
                        await self._load_slots(connection)
                        break
                    finally:
                        await connection.drop()
        self._refreshed = runtime.now()
        self._close_unused()

    async def _connect_any(self) -> ServerConnection:
        fault = StoreRefusedError("")
        for node in self._known:
            try:
                return await self._connector.connect(node)
            except StoreRefusedError as error:
                fault = error
        raise fault

    async def _load_slots(self, connection: ServerConnection) -> None:
        await connection.send([(b"CLUSTER", b"SLOTS")])
        async with self._connector.runtime.timeout(self._connector.timeout):
            ranges = await connection.read_reply()
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
        # Keep the nodes of the URL: their host names may resolve to new nodes when all known ones are gone.
        self._known = tuple(known | dict.fromkeys(self._connector.address.nodes))

    def _close_unused(self) -> None:
        """Close the pipelines to servers that have left the cluster."""
        for key in [key for key in self._pipelines if key[0] not in self._known]:
            task = self._connector.runtime.create_task(self._pipelines.pop(key).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _nodes(entries: Sequence[Any], queried: Node) -> Iterator[Node]:
    """The servers of a range of slots, the primary first. A server that does not know its name is the queried one."""
    for position, (host, port, *_) in enumerate(entries):
        name = host.decode() if host else ""
        if name not in {"", "?"}:
            yield Node(name, port)
        elif position == 0:
            yield Node(queried.host, port)
