"""`DriftMonitor`: compares batches with what their layers know, and keeps the result in the store.

Each process collects what it measured of a layer, and adds it at most once in an interval to the sums in the store, by
compare-and-set. So all processes together have one drift of a layer, as if each had sent its batches to one of them;
what a process that is killed has not saved, less than an interval's, is lost.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

import torch

from batchnorm_client.wire.errors import LayerNotFound, Overloaded, ProblemError

from ..engine.drift import Reference, measure, measured_moments, reference
from ..engine.posted import Posted
from ..runtime import Runtime
from ..store.base import Attachment, Committed, Missing, Store, StoreError
from ..telemetry import CURRENT_SPAN
from .cache import LayerCache
from .cached_state import layer_not_found, store_unavailable
from .compute import ComputeExecutor
from .drift_sampling import Sampling
from .drift_state import KEY, Advanced, DriftReport, advance, pack
from .drift_waiting import Origin, Taken, Waiting
from .fair_pool import CALLED_LAYER
from .records import CommittedLayer, now
from .results import DriftOptions

_log = logging.getLogger(__name__)

_PAUSE: Final = 0.01
"""Seconds between two writes: however many layers there are, each process makes at most 100 a second."""

_CHANNEL_BYTES: Final = 256
"""What adding to the sums costs for each channel, as bytes that `ComputeExecutor` compares with its limit."""

_RETRY: Final = 1.0
_ATTEMPTS: Final = 10
_CLOSING_SECONDS: Final = 5.0
_SHOWN_SECONDS: Final = 60.0
"""How long after its last batches the drift of a layer counts in the metrics."""


class DriftMonitor:
    """The drift of all layers.

    Args:
        store: where it is kept, beside each layer.
        cache: of the layers.
        executor: where what is large is computed.
        options: how it is measured; None if it is not.
        max_layers: how many layers may wait to be saved; of further ones nothing is measured.
        runtime: clock, random numbers, tasks.
    """

    def __init__(
        self,
        store: Store,
        cache: LayerCache,
        executor: ComputeExecutor,
        options: DriftOptions | None,
        max_layers: int,
        runtime: Runtime,
    ) -> None:
        self._store = store
        self._cache = cache
        self._executor = executor
        self._measures = options is not None
        self._options = options = options or DriftOptions()
        self._max_layers = max_layers
        self._runtime = runtime
        self._sampling = Sampling(options.share if self._measures else 0.0, runtime.now)
        self._waiting: dict[str, Waiting] = {}
        self._due: OrderedDict[str, None] = OrderedDict()
        self._saving: asyncio.Task[None] | None = None
        self._measuring: asyncio.Task[None] | None = None
        self._shown: OrderedDict[str, tuple[float, float, bool]] = OrderedDict()

    async def close(self) -> None:
        """Save what waits, if the store takes it soon, and stop."""
        for task in (self._measuring, self._saving):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        with suppress(TimeoutError, StoreError, ProblemError):
            async with self._runtime.timeout(_CLOSING_SECONDS):
                for name, waiting in self._waiting.items():
                    await self._save(name, waiting, unfinished=True)

    async def read(self, name: str) -> DriftReport:
        """The drift of a layer, with what this process has not saved yet.

        Raises:
            LayerNotFound: there is no such layer.
            StoreUnavailable: the store does not answer.
        """
        with self._cache.use(name) as entry:
            layer = await entry.cached.fresh()
        waiting = self._waiting.get(name)
        if waiting is None:
            return await self._read(name, layer, Taken(), 0)
        async with waiting.lock:
            return await self._read(name, layer, waiting.all, waiting.number)

    @property
    def measures(self) -> bool:
        """Whether drift is measured."""
        return self._measures

    @property
    def worst_score(self) -> float:
        """The largest score of the layers whose batches this process measured in the last minute."""
        return max((score for _, score, _ in self._recently_shown()), default=0.0)

    @property
    def drifting(self) -> int:
        """How many of these layers drift."""
        return sum(drifting for _, _, drifting in self._recently_shown())

    # ------------------------------------------------------------------------------------------------ measuring

    def evaluated(self, name: str, layer: CommittedLayer, batch: torch.Tensor, *, kept: bool) -> None:
        """A batch was normalized with this state, which is a `kept` one or the newest. It may be measured."""
        waiting = self._waiting.get(name)
        sampled = self._sampling.take(batch.nbytes, -math.inf if waiting is None else waiting.sampled)
        if sampled is None or not batch.numel():
            return
        known = reference(layer.state, from_start=layer.counted_from_start)
        if known is None or (waiting := self._of(name, layer)) is None:
            return
        waiting.sampled = sampled
        origin = None if kept else _origin(layer)
        if self._executor.runs_inline(batch.nbytes):
            waiting.add(origin, [measure(known, batch)])
            self._is_due(name, waiting)
        elif self._measuring is None:  # one at a time, because it keeps its batch in memory
            self._measuring = self._runtime.create_task(self._measure(name, waiting, origin, known, batch))

    def folded(self, name: str, layer: CommittedLayer, moments: Sequence[Posted]) -> None:
        """Batches were folded into this state, or would have been if the layer's tracking was not off."""
        self._add(name, layer, moments, folded=layer.state.tracks)

    def seen(self, name: str, layer: CommittedLayer, moments: Posted) -> None:
        """A caller has normalized batches by itself; these are their moments."""
        self._add(name, layer, [moments], folded=False)

    def changed(self, name: str, before: CommittedLayer, after: CommittedLayer) -> None:
        """If the statistics were set, what was measured before does not count any more."""
        if before.origin == after.origin or not self._measures:
            return
        if (waiting := self._of(name, after)) is not None:
            waiting.restarted = True
            self._is_due(name, waiting)

    def _add(self, name: str, layer: CommittedLayer, moments: Sequence[Posted], *, folded: bool) -> None:
        if not self._measures:
            return
        known = reference(layer.state, from_start=layer.counted_from_start)
        if known is not None and (waiting := self._of(name, layer)) is not None:
            waiting.add(_origin(layer), measured_moments(known, moments, folded=folded))
            self._is_due(name, waiting)

    async def _measure(
        self, name: str, waiting: Waiting, origin: Origin | None, known: Reference, batch: torch.Tensor
    ) -> None:
        CURRENT_SPAN.set(None)  # the call that this batch came with does not wait for it
        try:
            waiting.add(origin, [await self._executor.run(batch.nbytes, measure, known, batch)])
            self._is_due(name, waiting)
        finally:
            self._measuring = None

    def _of(self, name: str, layer: CommittedLayer) -> Waiting | None:
        """What waits of a layer; None if there are too many layers."""
        waiting = self._waiting.get(name)
        if waiting is None:
            if len(self._waiting) >= self._max_layers:
                idle = next((each for each, other in self._waiting.items() if not other.due), None)
                if idle is None:
                    return None
                del self._waiting[idle]
            waiting = self._waiting[name] = Waiting(layer.state.config.num_features)
        return waiting

    # ------------------------------------------------------------------------------------------------ saving

    def _is_due(self, name: str, waiting: Waiting) -> None:
        if not waiting.due:
            waiting.due = True
            self._due[name] = None
            if self._saving is None:
                self._saving = self._runtime.create_task(self._save_regularly())

    async def _save_regularly(self) -> None:
        CURRENT_SPAN.set(None)
        CALLED_LAYER.set(None)
        try:
            while self._due:
                name = next(iter(self._due))
                waiting = self._waiting[name]
                early = waiting.saved + self._options.seconds - self._runtime.now()
                if early > 0:
                    await self._runtime.sleep(early)
                del self._due[name]
                waiting.due = False
                try:
                    await self._save(name, waiting)
                except (StoreError, ProblemError) as error:
                    _log.warning("the drift of layer %r could not be saved, trying again: %s", name, error)
                    self._is_due(name, waiting)
                    await self._runtime.sleep(_RETRY)
                await self._runtime.sleep(_PAUSE)
        except Exception:
            _log.exception("drift could not be saved")
        finally:
            self._saving = None

    async def _save(self, name: str, waiting: Waiting, *, unfinished: bool = False) -> None:
        async with waiting.lock:
            taken = waiting.take(unfinished=unfinished)
            if not (taken.measured or waiting.restarted):
                return
            waiting.saved = self._runtime.now()
            try:
                await self._write(name, taken)
                waiting.restarted = False
            except LayerNotFound:
                waiting.restarted = False
            except BaseException:
                waiting.put_back(taken)
                raise

    async def _write(self, name: str, taken: Taken) -> None:
        """Add batches to the sums in the store. Raises what the store raises, or `LayerNotFound`."""
        with self._cache.use(name) as entry:
            layer = await entry.cached.fresh()
        for _ in range(_ATTEMPTS):
            found = await self._load(name, layer)
            advanced = await self._advance(found, taken, layer)
            new = Attachment(self._runtime.bits(63), pack(advanced.after))
            outcome = await self._store.attach(
                name, layer.stamp.incarnation, KEY, new, None if found is None else found.commit_id
            )
            if isinstance(outcome, Missing):
                raise layer_not_found(name)
            if isinstance(outcome, Committed):
                self._show(name, advanced)
                _log_passing(name, advanced)
                return
        raise Overloaded("too many processes save the drift of this layer at once")

    async def _read(self, name: str, layer: CommittedLayer, taken: Taken, number: int) -> DriftReport:
        try:
            found = await self._load(name, layer)
        except StoreError as error:
            raise store_unavailable(error) from error
        advanced = await self._advance(found, taken, layer)
        tag = f"{layer.stamp.tag}-{0 if found is None else found.commit_id:x}-{number}"
        return DriftReport(advanced.drift, self._options.threshold, advanced.after.since, advanced.after.history, tag)

    async def _load(self, name: str, layer: CommittedLayer) -> Attachment | None:
        found = await self._store.attachment(name, layer.stamp.incarnation, KEY)
        if isinstance(found, Missing):
            raise layer_not_found(name)
        return found

    async def _advance(self, found: Attachment | None, taken: Taken, layer: CommittedLayer) -> Advanced:
        channels = layer.state.config.num_features

        def work() -> Advanced:
            later = taken.smoothed(_origin(layer), channels)
            data = None if found is None else found.data
            return advance(data, later, layer, self._options.threshold, now(self._runtime))

        return await self._executor.run_codec(_CHANNEL_BYTES * channels + 8 * taken.nbytes, work)

    # ------------------------------------------------------------------------------------------------ metrics

    def _show(self, name: str, advanced: Advanced) -> None:
        self._shown[name] = self._runtime.now(), advanced.drift.score, advanced.after.since is not None
        self._shown.move_to_end(name)

    def _recently_shown(self) -> Iterable[tuple[float, float, bool]]:
        oldest = self._runtime.now() - _SHOWN_SECONDS
        while self._shown and next(iter(self._shown.values()))[0] < oldest:
            self._shown.popitem(last=False)
        return self._shown.values()


def _origin(layer: CommittedLayer) -> Origin:
    return layer.stamp.incarnation, layer.origin


def _log_passing(name: str, advanced: Advanced) -> None:
    before, after, drift = advanced
    if (before.since is None) == (after.since is None):
        return
    if after.since is None:
        _log.info("layer %r drifts no longer: score %.3g", name, drift.score)
    else:
        _log.warning("layer %r drifts: score %.3g, most in channel %s", name, drift.score, drift.worst)
