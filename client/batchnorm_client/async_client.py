"""The client that does not block. What it shares with the one that does is in `core` and `transport`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

import numpy.typing as npt

from batchnorm_client.arrays import A, to_numpy, to_torch
from batchnorm_client.core import Attempts, Request, Retry, calls, local
from batchnorm_client.core.group_member import GroupMember
from batchnorm_client.kernels.state import LocalState
from batchnorm_client.options import HttpOptions, LayerChanges, LayerOptions, Mode, What
from batchnorm_client.results import EvalResult, FoldResult, Gradients, TrainResult
from batchnorm_client.wire.documents import Layer, LayerSummary
from batchnorm_client.wire.errors import BatchNormError, NoAnswer, ProblemError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import httpx
    import torch

    from batchnorm_client.options import Moments, Numbers, StateDict

T = TypeVar("T")


class AsyncClient:
    """A batch-normalization service, from Python that does not block.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            layer = await client.create_layer("obs", num_features=64)
            output = (await layer.train(batch)).output

    Arguments, repeats, forks and exceptions are those of `Client`; `http` is an `httpx.AsyncClient`, and the deadline
    bounds that, too. A forked child runs an event loop of its own.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        retry: Retry | None = None,
        http: httpx.AsyncClient | None = None,
        **options: Unpack[HttpOptions],
    ) -> None:
        import anyio.to_thread  # noqa: PLC0415 - as httpx, which needs it

        # httpx takes longer to import than this whole package
        from batchnorm_client.transport.pools import AsyncConnections  # noqa: PLC0415
        from batchnorm_client.transport.requests import ServiceEndpoint  # noqa: PLC0415

        self._sleep = anyio.sleep
        self._in_thread = anyio.to_thread.run_sync
        endpoint = ServiceEndpoint(base_url, token, http, options)
        self._base_url = endpoint.base
        self._connections = AsyncConnections(endpoint, http)
        self._retry = retry or Retry()

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._base_url

    async def create_layer(self, name: str, num_features: int, **options: Unpack[LayerOptions]) -> AsyncRemoteLayer:
        """As `Client.create_layer`."""
        await self._call(calls.create(name, num_features, options))
        return self.layer(name)

    def layer(self, name: str) -> AsyncRemoteLayer:
        """As `Client.layer`; makes no call."""
        return AsyncRemoteLayer(self, name)

    async def layers(self, prefix: str = "") -> AsyncIterator[LayerSummary]:
        """As `Client.layers`: `async for layer in client.layers()`."""
        after: str | None = None
        while True:
            page = await self._call(calls.page(prefix, after))
            for layer in page.layers:
                yield layer
            after = page.next
            if after is None:
                return

    async def fold_moments(
        self, layers: Mapping[str, Moments], *, key: str | Mapping[str, str] | None = None
    ) -> dict[str, FoldResult | ProblemError]:
        """As `Client.fold_moments`; calls with different keys go out one after the other, too."""
        results: dict[str, FoldResult | ProblemError] = {}
        for request in calls.fold_many(layers, key=key):
            folded = await self._call(request)
            results |= folded
        return {name: results[name] for name in layers}

    async def ready(self) -> bool:
        """As `Client.ready`."""
        try:
            return await self._call(calls.ready(), Retry(attempts=1, deadline=self._retry.deadline))
        except NoAnswer:
            return False

    async def aclose(self) -> None:
        """Close the connections, unless the HTTP client was passed in."""
        await self._connections.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    async def _call(self, request: Request[T], retry: Retry | None = None) -> T:
        attempts = Attempts(request, retry or self._retry)
        while True:
            try:
                return attempts.receive(await self._connections.send(attempts))
            except BatchNormError as error:
                wait = attempts.pause(error)
            await self._sleep(wait)


class AsyncRemoteLayer:
    """A layer of a service: `RemoteLayer` with methods to be awaited.

    Attributes:
        name: of the layer.
    """

    def __init__(self, client: AsyncClient, name: str) -> None:
        calls.layer_path(name)
        self.name = name
        self._client = client
        self._held: LocalState | None = None

    async def train(
        self,
        x: A,
        *,
        key: str | None = None,
        statistics: bool = False,
        group: str | None = None,
        size: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the service's, which answers when it is over
    ) -> TrainResult[A]:
        """As `RemoteLayer.train`. Calls that run at the same time count in the order of their commits."""
        shard = GroupMember.of(group, size, timeout)
        return await self._client._call(calls.train(self.name, x, key=key, statistics=statistics, shard=shard))

    async def train_local(
        self,
        x: A,
        *,
        key: str | None = None,
        statistics: bool = False,
        group: str | None = None,
        size: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> TrainResult[A]:
        """As `RemoteLayer.train_local`; the arithmetic runs in a thread."""
        state, shard = await self._state(), GroupMember.of(group, size, timeout)
        in_thread = self._client._in_thread
        step = await in_thread(local.train_step, state, x) if shard is None else None
        moments = await in_thread(local.shard_moments, state, x) if step is None else step.moments
        done = await self._client._call(calls.fold_moments(self.name, moments, key=key, shard=shard))
        return await in_thread(partial(local.trained, state, x, step, done, statistics=statistics))

    async def fold_moments(
        self,
        count: int,
        mean: Numbers,
        var: Numbers,
        *,
        key: str | None = None,
        group: str | None = None,
        size: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> FoldResult:
        """As `RemoteLayer.fold_moments`."""
        shard = GroupMember.of(group, size, timeout)
        return await self._client._call(calls.fold_moments(self.name, (count, mean, var), key=key, shard=shard))

    async def eval(self, x: A, *, statistics: bool = False) -> EvalResult[A]:
        """As `RemoteLayer.eval`."""
        return await self._client._call(calls.evaluate(self.name, x, statistics=statistics))

    async def eval_local(self, x: A, *, statistics: bool = False) -> EvalResult[A]:
        """As `RemoteLayer.eval_local`; the arithmetic runs in a thread."""
        state = await self._state()
        return await self._client._in_thread(partial(local.eval_step, state, x, statistics=statistics))

    async def inverse(self, y: A) -> EvalResult[A]:
        """As `RemoteLayer.inverse`."""
        return await self._client._call(calls.inverse(self.name, y))

    async def backward(
        self,
        x: A,
        grad_output: A,
        mode: Mode = "train",
        *,
        key: str | None = None,
        group: str | None = None,
        size: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Gradients[A]:
        """As `RemoteLayer.backward`."""
        shard = GroupMember.of(group, size, timeout)
        return await self._client._call(calls.backward(self.name, x, grad_output, mode=mode, key=key, shard=shard))

    async def inspect(self) -> Layer:
        """As `RemoteLayer.inspect`."""
        return await self._client._call(calls.inspect(self.name))

    async def update(self, *, if_match: int | None = None, **changes: Unpack[LayerChanges]) -> Layer:
        """As `RemoteLayer.update`."""
        return await self._client._call(calls.update(self.name, changes, if_match))

    async def reset(
        self, what: What = "running_stats", *, key: str | None = None, if_match: int | None = None
    ) -> Layer:
        """As `RemoteLayer.reset`."""
        return await self._client._call(calls.reset(self.name, what, key, if_match))

    @overload
    async def state_dict(self, *, as_torch: Literal[False] = False) -> dict[str, npt.NDArray[Any]]: ...
    @overload
    async def state_dict(self, *, as_torch: Literal[True]) -> dict[str, torch.Tensor]: ...
    @overload
    async def state_dict(self, *, as_torch: bool) -> dict[str, npt.NDArray[Any]] | dict[str, torch.Tensor]: ...
    async def state_dict(self, *, as_torch: bool = False) -> dict[str, npt.NDArray[Any]] | dict[str, torch.Tensor]:
        """As `RemoteLayer.state_dict`."""
        tensors = await self._client._call(calls.state(self.name))
        if as_torch:
            return {name: to_torch(tensor) for name, tensor in tensors.items()}
        return {name: to_numpy(tensor) for name, tensor in tensors.items()}

    async def load_state_dict(self, state_dict: StateDict, *, if_match: int | None = None) -> Layer:
        """As `RemoteLayer.load_state_dict`."""
        return await self._client._call(calls.replace_state(self.name, state_dict, if_match))

    async def delete(self, *, if_match: int | None = None) -> None:
        """As `RemoteLayer.delete`."""
        await self._client._call(calls.delete(self.name, if_match))

    async def _state(self) -> LocalState:
        self._held = await self._client._call(calls.revalidate(self.name, self._held))
        return self._held

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r} at {self._client.base_url})"
