"""Operations on the states of one or of several layers: reading them, waiting for others, replacing them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from batchnorm_client.wire.errors import LayerNotFound, PayloadTooLarge, ProblemError, VersionMismatch
from batchnorm_client.wire.tensors import Tensor

from ..engine import state_dict
from ..runtime import Runtime
from ..store.base import Store, StoreError
from .batches import Read
from .cache import LayerCache
from .cached_state import store_unavailable
from .compute import ComputeExecutor
from .idempotency import make_token
from .layer_states import Buffers, LayerStates
from .records import CommittedLayer
from .updates import Change, Done, IfMatch, ReplacedError, check_version
from .watches import Selection, Watches

T = TypeVar("T")

MAX_LAYERS: Final = 10_000
_PAGE: Final = 1000
_AT_ONCE: Final = 64
_HEADER_BYTES: Final = 120
"""About how long the entry of a tensor in a safetensors header is."""


class Found(NamedTuple):
    """What a caller who may know the states of layers gets.

    Attributes:
        states: the states; None if the caller has waited in vain for others.
        tags: of the states.
        known: whether the caller knows them.
    """

    states: LayerStates | None
    tags: tuple[str, ...]
    known: bool


class States:
    """Operations on the states of one or of several layers.

    Args:
        store: of the layers.
        cache: of the layers.
        executor: where large files are written.
        waiting_calls: how many calls may wait.
        runtime: tasks, clock.

    Attributes:
        watches: the calls that wait.
    """

    def __init__(
        self, store: Store, cache: LayerCache, executor: ComputeExecutor, waiting_calls: int, runtime: Runtime
    ) -> None:
        self._store = store
        self._cache = cache
        self._executor = executor
        self._runtime = runtime
        self.watches: Final = Watches(store, self.read, waiting_calls, runtime)

    async def read(self, selection: Selection) -> LayerStates:
        """The newest committed state of each selected layer.

        Raises:
            LayerNotFound: there is no layer of one of the names.
            PayloadTooLarge: there are more than `MAX_LAYERS` layers.
            StoreUnavailable: the store does not answer.
        """
        names = selection.names or await self._names(selection.prefix)
        found: dict[str, CommittedLayer | None] = {name: self._cache.trusted(name) for name in names}
        missing = [name for name, layer in found.items() if layer is None]
        if len(missing) == 1:
            found[missing[0]] = await self._fresh(missing[0], selection)
        else:
            for first in range(0, len(missing), _AT_ONCE):
                some = missing[first : first + _AT_ONCE]
                found.update(zip(some, await self._fresh_each(some, selection), strict=True))
        return LayerStates({name: layer for name, layer in found.items() if layer is not None})

    async def unless(
        self,
        selection: Selection,
        known: frozenset[str] | None,
        seconds: float = 0.0,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Found:
        """The states of the layers, as soon as the caller does not know them.

        Args:
            selection: the layers.
            known: tags of the states that the caller knows; `*` stands for all. None if it knows none.
            seconds: how long to wait while the caller knows the states.
            waiting: entered while the call waits.

        Raises:
            Overloaded: too many calls are waiting.
            ProblemError: as `read`.
        """
        if known is None or not seconds:
            states = await self.read(selection)
            return Found(states, states.tags, known=known is not None and is_known(known, states.tags))
        deadline = self._runtime.now() + seconds
        with self.watches.use(selection) as watch:
            while True:
                changes = watch.changes
                tags = watch.tags if self._store.exclusive else None
                if tags is None or not is_known(known, tags):
                    states = await watch.read()
                    tags = states.tags
                    if not is_known(known, tags):
                        return Found(states, tags, known=False)
                left = deadline - self._runtime.now()
                if left <= 0:
                    return Found(None, tags, known=True)
                if changes == watch.changes:  # no change was reported since they were read
                    with waiting():
                        woken = await self.watches.wait(watch, tags, left)
                    if woken is None:
                        return Found(None, tags, known=True)
                    if not is_known(known, woken.tags):
                        return Found(woken, woken.tags, known=False)

    async def once(self, states: LayerStates, form: str, encode: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `encode`, which is called once for a form of these states, however many calls ask for it."""
        return await states.once(self._runtime, form, encode)

    async def file(self, states: LayerStates, max_bytes: int) -> Buffers:
        """The states as a safetensors file; a long header is written in a thread. Raises `PayloadTooLarge`."""
        return await self._executor.encode(_HEADER_BYTES * states.tensors, states.file, max_bytes)

    async def replace(
        self, name: str, read: Read, if_match: IfMatch, *, nbytes: int = 0, frequent: bool = False
    ) -> Done:
        """Replace the tensors that `read` returns. With large `nbytes`, the body's size, `read` runs in a thread.

        Args:
            name: the layer.
            read: decodes the tensors.
            if_match: the precondition.
            nbytes: how many bytes `read` has to process.
            frequent: whether this may come as often as batches do, and counts as a PATCH of weight and bias: see
                `Retention`.
        """
        with self._cache.use(name) as entry:
            while True:
                layer = await entry.cached.latest_known()
                try:
                    tensors = await self._executor.decode(nbytes, read, state_dict.dtypes(layer.state))
                except ProblemError:
                    newest = await entry.cached.fresh()
                    check_version(if_match, newest)
                    if newest.stamp.incarnation != layer.stamp.incarnation:
                        continue  # decoded for a layer that was deleted
                    raise
                replaced = partial(state_dict.replace_tensors, tensors=tensors)
                token = make_token(self._runtime, None, "")
                incarnation = layer.stamp.incarnation
                operation = "update" if frequent else "replace"
                change = Change(token, operation, replaced, if_match, incarnation, frequent=frequent)
                with suppress(ReplacedError):
                    return await entry.queue.submit(change)

    async def replace_many(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        versions: Mapping[str, int],
        if_match: frozenset[int | str] | None,
    ) -> dict[str, Done | Exception]:
        """Replace tensors of many layers; each layer all or nothing.

        An exception while replacing those of one layer, of any type, becomes that layer's result.

        Args:
            tensors: by layer. Setting only weight and bias counts as a batch in the history, as an optimizer does it.
            versions: preconditions of some of the layers.
            if_match: tags of which one must be that of all these layers together; None if any may.

        Raises:
            VersionMismatch: the layers have another tag; none is changed.
        """
        expected: dict[str, IfMatch] = {name: frozenset((version,)) for name, version in versions.items()}
        if if_match is not None:
            states = await self.read(Selection(tuple(sorted(tensors))))
            if if_match.isdisjoint(states.tags):
                got = sorted(map(str, if_match))
                raise VersionMismatch("the layers have other states", field="If-Match", expected=states.tag, got=got)
            for name, layer in states.layers.items():
                if layer.stamp.version == versions.get(name, layer.stamp.version):
                    expected[name] = frozenset((layer.stamp.tag,))

        async def one(name: str, given: Mapping[str, Tensor]) -> Done | Exception:
            try:
                frequent = given.keys() <= {"weight", "bias"}
                return await self.replace(name, lambda _: given, expected.get(name), frequent=frequent)
            except Exception as error:
                return error

        return dict(zip(tensors, await asyncio.gather(*(one(*item) for item in tensors.items())), strict=True))

    async def _names(self, prefix: str) -> list[str]:
        names: list[str] = []
        after = ""
        while True:
            try:
                page = await self._store.list(prefix, after, _PAGE)
            except StoreError as error:
                raise store_unavailable(error) from error
            names += [entry.name for entry in page]
            if len(page) < _PAGE:
                return names
            if len(names) >= MAX_LAYERS:
                raise PayloadTooLarge(
                    f"more than {MAX_LAYERS} layers have names that start with {prefix!r}; give a longer prefix",
                    field="prefix",
                    expected=MAX_LAYERS,
                )
            after = page[-1].name

    async def _fresh(self, name: str, selection: Selection) -> CommittedLayer | None:
        """A layer's newest state; None if it was deleted after the layers of a prefix had been listed."""
        try:
            with self._cache.use(name) as entry:
                return await entry.cached.fresh()
        except LayerNotFound:
            if selection.names:
                raise
            return None

    async def _fresh_each(self, names: list[str], selection: Selection) -> list[CommittedLayer | None]:
        found = await asyncio.gather(*(self._fresh(name, selection) for name in names), return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return [result for result in found if not isinstance(result, BaseException)]


def is_known(known: frozenset[str], tags: Iterable[str]) -> bool:
    """Whether one of the tags of a state is among those that a caller knows."""
    return "*" in known or not known.isdisjoint(tags)
