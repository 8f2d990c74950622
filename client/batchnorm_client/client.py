"""The client that blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

import numpy.typing as npt

from batchnorm_client.arrays import A, to_numpy, to_torch
from batchnorm_client.contract import Layer, LayerSummary
from batchnorm_client.core import Answer, Attempts, Request, Retry, calls
from batchnorm_client.errors import BatchNormError, NoAnswer
from batchnorm_client.options import HttpOptions, LayerChanges, LayerOptions, What
from batchnorm_client.results import EvalResult, TrainResult

if TYPE_CHECKING:
    import httpx
    import torch

    from batchnorm_client.options import StateDict

T = TypeVar("T")


class Client:
    """A batch-normalization service, from Python. A context manager; may be shared by threads.

        with Client("http://127.0.0.1:8000") as client:
            layer = client.create_layer("obs", num_features=64)
            output = layer.train(batch).output

    Calls that fail on the way are sent again until they succeed or the deadline is reached, and never count twice:
    train and reset carry a key, by which the service knows a repeat. What is repeated:

        inspect, state_dict, layers, eval   always: they change nothing
        create_layer, train, reset          always: the service recognizes the repeat
        update                              always: it sets values; with `if_match` no other's update is lost either
        load_state_dict, delete             with `if_match` always; without it only while no try can have taken
                                            effect, after that they raise, with `outcome_unknown` set

    Repeated are failures to connect, cut connections, timeouts and the statuses 502, 503 and 504. Waits between tries
    grow, and respect `Retry-After`.

    Args:
        base_url: of the service, also with a path. By default that of `http` if it has one, else the environment
            variable BATCHNORM_URL, else http://127.0.0.1:8000.
        token: a bearer token. By default the environment variable BATCHNORM_TOKEN; with `http`, none.
        retry: how often a call is tried, and the deadline for all tries together.
        http: an HTTP client to be used as it is, and not closed. Without it one is made, from the options below.
        options: httpx's own: `timeout` (by default 30 s, and 5 s to connect), `limits`, `verify`, `cert`, `proxy`,
            `trust_env`.

    Raises:
        ValueError: `base_url` is no http or https URL, or the token cannot be sent.
        TypeError: options besides `http`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        retry: Retry | None = None,
        http: httpx.Client | None = None,
        **options: Unpack[HttpOptions],
    ) -> None:
        import httpx  # noqa: PLC0415 - it takes longer to import than this whole package

        from batchnorm_client import transport  # noqa: PLC0415

        self._transport = transport
        self._link = transport.Link(base_url, token, http, options)
        self._own = http is None
        self._http = httpx.Client(**self._link.options) if http is None else http
        self._retry = retry or Retry()

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._link.base

    def create_layer(self, name: str, num_features: int, **options: Unpack[LayerOptions]) -> RemoteLayer:
        """Create a layer, or make sure that it exists: repeating the call with the same config is harmless.

        Args:
            name: 1 to 200 letters, digits, dots, underscores and hyphens; torch module paths such as "layer1.0.bn1"
                fit.
            num_features: C, the number of channels.
            options: `eps`, `momentum`, `affine`, `track_running_stats`, `statistics`, `dimensions`, `channel_axis`,
                `dtype`, `device`, `non_finite`; see `LayerOptions`. Those left out have torch's defaults.

        Raises:
            LayerExists: it exists, and was created with another config.
            InvalidRequest: the name or an option is not valid; `fields["field"]` says which.
            TooManyLayers, DeviceUnavailable: the service cannot hold it.
        """
        self._call(calls.create(name, num_features, options))
        return self.layer(name)

    def layer(self, name: str) -> RemoteLayer:
        """A handle for a layer. Makes no call: whether the layer exists shows when the handle is used.

        Raises:
            InvalidRequest: no layer can be called that.
        """
        return RemoteLayer(self, name)

    def layers(self, prefix: str = "") -> Iterator[LayerSummary]:
        """All layers whose names start with `prefix`, by name; asks for page after page as it goes."""
        after: str | None = None
        while True:
            page = self._call(calls.page(prefix, after))
            yield from page.layers
            after = page.next
            if after is None:
                return

    def ready(self) -> bool:
        """Whether the service can work now. Asks once; False also when it cannot be reached."""
        try:
            return self._call(calls.ready(), Retry(attempts=1, deadline=self._retry.deadline))
        except NoAnswer:
            return False

    def close(self) -> None:
        """Close the connections, unless the HTTP client was passed in."""
        if self._own:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def _call(self, request: Request[T], retry: Retry | None = None) -> T:
        attempts = Attempts(request, retry or self._retry)
        while True:
            try:
                return attempts.receive(self._send(attempts))
            except BatchNormError as error:
                wait = attempts.pause(error)
            time.sleep(wait)

    def _send(self, attempts: Attempts[Any]) -> Answer:
        with self._transport.our_errors():
            response = self._http.send(self._link.outgoing(self._http, attempts.request, attempts), stream=True)
            try:
                incoming = self._transport.Incoming(response, attempts.remaining)
                for part in response.iter_bytes():
                    incoming.add(part)
            finally:
                response.close()
        return incoming.answer()


class RemoteLayer:
    """A layer of a service: a handle that holds the name and no state. Made by `Client.layer` and `create_layer`.

    Every method may raise, besides what it says: `LayerNotFound`; `Unauthenticated` and `Forbidden`; `Overloaded`,
    `StoreUnavailable`, `ConnectionFailed` and `TimedOut` after all tries; `UnexpectedAnswer`.

    Attributes:
        name: of the layer.
    """

    def __init__(self, client: Client, name: str) -> None:
        calls.layer_path(name)
        self.name = name
        self._client = client

    def train(self, x: A, *, key: str | None = None, statistics: bool = False) -> TrainResult[A]:
        """Normalize a batch with its own statistics, and fold these into the running ones. Counts exactly once.

        Args:
            x: (N, C, *), or with the channels where the layer's `channel_axis` says; a numpy array or a torch tensor.
                float16, bfloat16 or float32 for a float32 layer, float64 for a float64 layer. Gradients do not flow.
            key: names this batch: a repeat with the same key and batch counts no second time, whoever sends it, for as
                long as the service keeps receipts (one hour by default). By default a new one, which makes the
                client's own tries safe.
            statistics: also return the batch's mean, biased variance and inverse standard deviation.

        Raises:
            ShapeMismatch, DtypeMismatch: the batch does not fit the layer.
            TooFewValues: fewer than two values per channel.
            NonFinite: NaN, infinity or overflow, unless the layer allows them.
            IdempotencyKeyReused: the key belongs to another batch.
            PayloadTooLarge: the batch is larger than the service takes.
            TypeError: `x` is no array, or has a dtype that does not travel.
        """
        return self._client._call(calls.train(self.name, x, key=key, statistics=statistics))

    def eval(self, x: A, *, statistics: bool = False) -> EvalResult[A]:
        """Normalize a batch with the running statistics (with its own, if the layer keeps none). Changes nothing.

        Args:
            x: as for `train`; may be empty.
            statistics: also return the mean, variance and inverse standard deviation that were used.

        Raises:
            ShapeMismatch, DtypeMismatch, PayloadTooLarge, TypeError: as for `train`.
            TooFewValues: one value per channel, and the layer keeps no running statistics.
        """
        return self._client._call(calls.evaluate(self.name, x, statistics=statistics))

    def inspect(self) -> Layer:
        """The layer's config, counters and state, as of its newest commit."""
        return self._client._call(calls.inspect(self.name))

    def update(self, *, if_match: int | None = None, **changes: Unpack[LayerChanges]) -> Layer:
        """Set `eps`, `momentum` (None: cumulative), `track_running_stats`, `non_finite`, `weight` or `bias`.

        Args:
            if_match: do it only if the layer has this version.
            changes: those to set; weight and bias are (C,) arrays, tensors or lists.

        Raises:
            VersionMismatch: the layer has another version than `if_match`.
            InvalidRequest, ShapeMismatch, NonFinite: a value does not fit; nothing was set.
        """
        return self._client._call(calls.update(self.name, changes, if_match))

    def reset(self, what: What = "running_stats", *, key: str | None = None, if_match: int | None = None) -> Layer:
        """Set running statistics ("running_stats"), weight and bias ("parameters") or both ("all") back, as torch does.

        Args:
            what: to set back.
            key: names this reset, as in `train`.
            if_match: do it only if the layer has this version.

        Raises:
            VersionMismatch: the layer has another version than `if_match`.
            IdempotencyKeyReused: the key belongs to another call.
        """
        return self._client._call(calls.reset(self.name, what, key, if_match))

    @overload
    def state_dict(self, *, as_torch: Literal[False] = False) -> dict[str, npt.NDArray[Any]]: ...
    @overload
    def state_dict(self, *, as_torch: Literal[True]) -> dict[str, torch.Tensor]: ...
    def state_dict(self, *, as_torch: bool = False) -> dict[str, npt.NDArray[Any]] | dict[str, torch.Tensor]:
        """The layer's tensors, by their names in torch's `nn.BatchNorm*.state_dict()`.

        A population layer also has `samples_tracked`, `population_mean` and `population_m2`.

        Args:
            as_torch: torch tensors, on the CPU, for `module.load_state_dict`; numpy arrays otherwise.
        """
        tensors = self._client._call(calls.state(self.name))
        if as_torch:
            return {name: to_torch(tensor) for name, tensor in tensors.items()}
        return {name: to_numpy(tensor) for name, tensor in tensors.items()}

    def load_state_dict(self, state_dict: StateDict, *, if_match: int | None = None) -> Layer:
        """Replace the layer's tensors by those given; others stay.

        Args:
            state_dict: of a torch module or of another layer; numpy arrays or torch tensors.
            if_match: do it only if the layer has this version. Without it, a call whose answer was lost is not
                repeated, because batches that others trained since would be undone; it raises, with `outcome_unknown`
                set.

        Raises:
            VersionMismatch: the layer has another version than `if_match`.
            InvalidRequest, ShapeMismatch, DtypeMismatch, NonFinite: a tensor does not fit; nothing was replaced.
        """
        return self._client._call(calls.replace_state(self.name, state_dict, if_match))

    def delete(self, *, if_match: int | None = None) -> None:
        """Delete the layer and its receipts.

        Args:
            if_match: do it only if the layer has this version. Without it, a call whose answer was lost is not
                repeated, because another layer may have the name by then; if the layer is not gone, it raises, with
                `outcome_unknown` set.

        Raises:
            VersionMismatch: the layer has another version than `if_match`.
        """
        self._client._call(calls.delete(self.name, if_match))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r} at {self._client.base_url})"
