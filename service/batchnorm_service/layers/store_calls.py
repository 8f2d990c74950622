"""A layer's calls to the store: what is idempotent is repeated while the store does not respond."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from batchnorm_client.wire.errors import ProblemError, StoreUnavailable

from ..runtime import Runtime
from ..store.base import (
    Committed,
    Conflict,
    Duplicates,
    Missing,
    Pinned,
    Receipt,
    Record,
    Stamp,
    Store,
    StoreError,
    StoreLostError,
)
from ..telemetry.layers import LayerMetrics, Update
from ..telemetry.traces import commit_span
from .cached_state import CachedState
from .idempotency import IdempotencyToken
from .updates import Done, Queued, ReplacedError, replay

T = TypeVar("T")

_log = logging.getLogger(__name__)
_MIN_PAUSE, _MAX_PAUSE = 0.01, 0.5  # seconds between retries while the store does not respond


class StoreCalls:
    """Calls to the store for one layer.

    A commit with an unknown outcome is repeated unchanged: if the first attempt took effect, the store returns its
    receipts as duplicates, so nothing is folded twice.

    Args:
        cached: the layer's state, which is forgotten when the outcome of a call is unknown.
        store: the store.
        timeout: seconds to repeat a call.
        runtime: clock, sleep.
        metrics: what is reported of commits.
    """

    def __init__(
        self, cached: CachedState, store: Store, timeout: float, runtime: Runtime, metrics: LayerMetrics
    ) -> None:
        self._cached = cached
        self._store = store
        self._timeout = timeout
        self._runtime = runtime
        self._metrics = metrics

    def deadline(self) -> float:
        """Until when a call that begins now is repeated."""
        return self._runtime.now() + self._timeout

    async def retry(self, call: Callable[[], Awaitable[T]]) -> tuple[T, bool]:
        """The result of an idempotent store call, and whether it had to be repeated.

        Raises:
            StoreUnavailable: the store does not respond; the outcome may be unknown.
        """
        return await self._retry(call, self.deadline())

    async def find(self, token: IdempotencyToken, incarnation: int) -> Receipt | None:
        """The unexpired receipt of this token. Raises `ReplacedError` if that incarnation was deleted."""
        return (await self.find_all([token], incarnation)).get(token.key)

    async def find_all(self, tokens: Iterable[IdempotencyToken], incarnation: int) -> dict[bytes, Receipt]:
        """The unexpired receipts of these tokens, by key. Raises `ReplacedError` if that incarnation was deleted."""
        name, keys = self._cached.name, [token.key for token in tokens]
        found, _ = await self.retry(lambda: self._store.find_receipts(name, incarnation, keys))
        if isinstance(found, Missing):
            self._cached.set(None)
            raise ReplacedError
        return {receipt.key: receipt for receipt in found}

    async def replayed(self, token: IdempotencyToken, incarnation: int, error: ProblemError) -> Done:
        """The result of a call that is refused now, if it was made before under its key; raises `error` if not.

        Raises:
            ReplacedError: that incarnation was deleted.
        """
        receipt = await self.find(token, incarnation) if token.from_caller else None
        done = error if receipt is None else replay(token, await self._cached.fresh(), receipt)
        if isinstance(done, ProblemError):
            raise done
        return done

    async def commit(
        self,
        update: Update,
        waiting: Sequence[Queued],
        expected: Stamp,
        new: Record | None,
        receipts: Sequence[Receipt],
        deadline: float,
        keep: int = 0,
    ) -> Committed | Conflict | Missing | Duplicates:
        """Commit; after an unknown outcome, commit the same again, which the receipts make idempotent.

        Args:
            update: what it is for.
            waiting: the updates that it holds.
            expected: the stamp that the record must have.
            new: the record; None for receipts alone.
            receipts: those of the updates.
            deadline: until when it is repeated.
            keep: how many earlier states are kept.
        """
        name = self._cached.name
        spans = [each.span for each in waiting if each.span is not None]
        with commit_span(spans, {"batchnorm.layer": name, "batchnorm.updates": len(waiting)}) as span:
            outcome, repeated = await self._retry(
                lambda: self._store.commit(name, expected, new, receipts, keep), deadline
            )
            if repeated and isinstance(outcome, Duplicates) and set(outcome.receipts) == set(receipts):
                outcome = Committed()
            if span is not None:
                span.attributes["batchnorm.result"] = type(outcome).__name__.lower()
        if isinstance(outcome, Committed):
            self._metrics.committed(update, len(receipts))
        elif isinstance(outcome, Conflict):
            self._metrics.conflicted(update)
        return outcome

    async def delete(
        self, expected: Stamp, deadline: float, *, with_pins: bool
    ) -> Committed | Conflict | Missing | Pinned:
        """Delete, with retries. After an unknown outcome, a missing incarnation counts as success."""
        pause, unknown = _MIN_PAUSE, False
        while True:
            try:
                outcome = await self._store.delete(self._cached.name, expected, with_pins=with_pins)
                if unknown and not isinstance(outcome, Committed):
                    found = await self._store.load(self._cached.name)
                    if not isinstance(found, Record) or found.stamp.incarnation != expected.incarnation:
                        return Committed()
            except StoreError as error:
                unknown = True
                pause = await self._pause(pause, deadline, error)
                continue
            return outcome

    async def _retry(self, call: Callable[[], Awaitable[T]], deadline: float) -> tuple[T, bool]:
        """The result of an idempotent store call, retried until the deadline, and whether it was repeated."""
        pause, repeated = _MIN_PAUSE, False
        while True:
            try:
                result = await call()
            except StoreError as error:
                if not repeated:
                    _log.warning("layer %r: the store does not answer, trying again: %s", self._cached.name, error)
                repeated = True
                pause = await self._pause(pause, deadline, error)
                continue
            if repeated:
                _log.warning("layer %r: the store answers again", self._cached.name)
            return result, repeated

    async def _pause(self, pause: float, deadline: float, error: StoreError) -> float:
        """Pause before a retry; return the length of the pause after it.

        Raises:
            StoreUnavailable: the deadline is over, or the store is lost for good.
        """
        self._cached.set(None)
        if isinstance(error, StoreLostError) or self._runtime.now() + pause > deadline:
            raise StoreUnavailable(f"the store does not answer: {error}", retry_after=1) from error
        await self._runtime.sleep(pause)
        return min(2 * pause, _MAX_PAUSE)
