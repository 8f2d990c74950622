# Generated from async_client.py by generate_sync.py (make sync-client): change that file, not this one.
"""The client that blocks."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

from batchnorm_client.core import Attempts, Request, Retry, calls
from batchnorm_client.core.runtime import SyncRuntime
from batchnorm_client.layer import RemoteLayer
from batchnorm_client.options import HttpOptions, LayerOptions
from batchnorm_client.results import FoldResult
from batchnorm_client.wire.documents import LayerSummary
from batchnorm_client.wire.errors import BatchNormError, NoAnswer, ProblemError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import httpx

    from batchnorm_client.options import Moments

T = TypeVar("T")


class Client:
    """A batch-normalization service, from Python. A context manager; may be shared by threads.

        with Client("http://127.0.0.1:8000") as client:
            layer = client.create_layer("obs", num_features=64)
            output = layer.train(batch).output

    Calls that fail on the way are sent again until they succeed or the deadline is reached, and never count twice:
    train and reset carry a key, by which the service knows a repeat. What is repeated:

        inspect, state_dict, layers, eval,
        eval_local, inverse, backward       always: they change nothing
        create_layer, train, reset,
        train_local, fold_moments           always: the service recognizes the repeat
        update                              always: it sets values; with `if_match` no other's update is lost either
        load_state_dict, delete             with `if_match` always; without it only while no try can have taken
                                            effect, after that they raise, with `outcome_unknown` set

    Repeated are failures to connect, cut connections, timeouts and the statuses 502, 503 and 504. Waits between tries
    grow, and respect `Retry-After`. A group that stayed incomplete (`GroupIncomplete`) is never tried again: it needs a
    new id. Each repeat is logged before it is sent, as a WARNING of the logger `batchnorm_client`.

    After a fork (`os.fork`, `multiprocessing`) the child may go on with a client that its parent made: each process
    opens connections of its own. With `http` it may not, because that shares its parent's; such a call is refused.

    A call of a client that is closed raises `ConnectionFailed`, also one that is under way.

    Args:
        base_url: of the service, also with a path. By default that of `http` if it has one, else the environment
            variable BATCHNORM_URL, else http://127.0.0.1:8000.
        token: a bearer token. By default the environment variable BATCHNORM_TOKEN; with `http`, none.
        retry: how often a call is tried, and the deadline for all tries together.
        http: an HTTP client to be used as it is, and not closed. Its timeouts bound each read by itself: of an answer's
            headers that come byte by byte it waits for all, also beyond the deadline. Without it connections are made
            here, from the options below.
        options: httpx's own: `timeout` (by default 30 s, and 5 s to connect), `limits`, `verify`, `cert`, `proxy`,
            `trust_env`.

    Raises:
        ValueError: `base_url` is no http or https URL, or the token cannot be sent.
        TypeError: options besides `http`.
    """

    _runtime = SyncRuntime()
    """Clock, chance, sleep and threads; a simulated client has its own."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        retry: Retry | None = None,
        http: httpx.Client | None = None,
        **options: Unpack[HttpOptions],
    ) -> None:
        # httpx takes longer to import than this whole package
        from batchnorm_client.transport.connections import Connections  # noqa: PLC0415
        from batchnorm_client.transport.requests import ServiceEndpoint  # noqa: PLC0415

        endpoint = ServiceEndpoint(base_url, token, http, options)
        self._base_url = endpoint.base
        self._connections = Connections(endpoint, http)
        self._retry = retry or Retry()

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._base_url

    def create_layer(self, name: str, num_features: int, **options: Unpack[LayerOptions]) -> RemoteLayer:
        """Create a layer, or make sure that it exists: repeating the call with the same config is harmless.

        Args:
            name: 1 to 200 letters, digits, dots, underscores and hyphens; torch module paths such as "layer1.0.bn1"
                fit.
            num_features: C, the number of channels.
            options: `eps`, `momentum`, `affine`, `track_running_stats`, `statistics`, `dimensions`, `channel_axis`,
                `dtype`, `device`, `non_finite`, `half_life`, `clip`; see `LayerOptions`. Those left out have torch's
                defaults.

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
        """All layers whose names start with `prefix`, by name: `for layer in client.layers()`.

        Asks for page after page as it goes.
        """
        after: str | None = None
        while True:
            page = self._call(calls.page(prefix, after))
            yield from page.layers
            after = page.next
            if after is None:
                return

    def fold_moments(
        self, layers: Mapping[str, Moments], *, key: str | Mapping[str, str] | None = None
    ) -> dict[str, FoldResult | ProblemError]:
        """Fold the moments of batches that stayed here into many layers, in one call: each once, or not at all.

        Args:
            layers: (count, mean, var) by layer name, as `RemoteLayer.fold_moments` takes them.
            key: names the whole, and counts for each layer by itself: a repeat folds what was not folded yet. Or one
                key for each layer, by name. A call carries one key, so layers with different keys go out one call
                after the other, those with equal keys together. If one of the calls fails, it raises, and those before
                it were folded; a repeat with the same keys counts nothing twice.

        Returns:
            What became of each: the result, or the exception that the layer's own call would have raised.

        Raises:
            ValueError: `key` has other names than `layers`. Nothing was sent.
        """
        results: dict[str, FoldResult | ProblemError] = {}
        for request in calls.fold_many(layers, key=self._runtime.key() if key is None else key):
            folded = self._call(request)
            results |= folded
        return {name: results[name] for name in layers}

    def ready(self) -> bool:
        """Whether the service can work now. Asks once; False also when it cannot be reached."""
        try:
            return self._call(calls.ready(), Retry(attempts=1, deadline=self._retry.deadline))
        except NoAnswer:
            return False

    def close(self) -> None:
        """Close the connections, unless the HTTP client was passed in."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def _key(self, key: str | None) -> str:
        """The caller's key, or a new one: with it every repeat is safe."""
        return self._runtime.key() if key is None else key

    def _call(self, request: Request[T], retry: Retry | None = None) -> T:
        attempts = Attempts(request, retry or self._retry, self._runtime)
        while True:
            try:
                return attempts.receive(self._connections.send(attempts))
            except BatchNormError as error:
                wait = attempts.pause(error)
            self._runtime.sleep(wait)
