# Generated from async_client.py by generate_sync.py (make sync-client): change that file, not this one.
"""The synchronous client."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

from batchnorm_client.core import Attempts, Request, Retry, calls, state_calls
from batchnorm_client.core.follow_options import FollowOptions
from batchnorm_client.core.runtime import SyncRuntime
from batchnorm_client.follower import Follower
from batchnorm_client.layer import RemoteLayer
from batchnorm_client.options import Cast, HttpOptions, LayerOptions
from batchnorm_client.results import FoldResult, LayerStates, Replaced
from batchnorm_client.wire.documents import LayerSummary
from batchnorm_client.wire.errors import BatchNormError, NoAnswer, ProblemError
from batchnorm_client.wire.figures import Figures

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Mapping

    import httpx

    from batchnorm_client.options import Moments, StateDict

T = TypeVar("T")


class Client:
    """A client of a batch-normalization service. A context manager; threads may share it.

        with Client("http://127.0.0.1:8000") as client:
            layer = client.create_layer("obs", num_features=64)
            output = layer.train(batch).output

    Calls that fail temporarily are retried until they succeed or the deadline is reached. No batch is counted twice:
    calls that fold a batch, reset and rollback carry an idempotency key, by which the service recognizes a repeat.
    Retried are:

        inspect, state_dict, layers, eval,
        eval_local, inverse, backward,
        history, pins, states, follow       always: they change nothing
        create_layer, train, reset,
        train_local, fold_moments,
        rollback, pin                       always: the service recognizes the repeat
        update                              always: it sets values; `if_match` also protects the updates of others
        unpin                               only while no attempt can have taken effect; then it asks whether the pin
                                            is gone
        load_states                         of weights and biases only, without versions: always; else only while no
                                            attempt can have taken effect
        load_state_dict, delete             with `if_match` always; without it only while no attempt can have taken
                                            effect. After that they raise, with `outcome_unknown` set

    The reasons for a retry are failures to connect, lost connections, timeouts and the statuses 408, 502, 503 and 504.
    Waits between attempts grow, and respect `Retry-After`. `GroupIncomplete` is never retried, because that needs a new
    group id. Each retry is logged before it is sent, as a WARNING of the logger `batchnorm_client`.

    A client may be used after a fork (`os.fork`, `multiprocessing`): each process opens its own connections. With
    `http`, calls in the child process are refused, because it would share the parent's connections.

    Calls of a closed client raise `ConnectionFailed`, and so do calls that are running when it is closed.

    Args:
        base_url: of the service; may have a path. By default that of `http` if it has one, else the environment
            variable BATCHNORM_URL, else http://127.0.0.1:8000.
        token: a bearer token. By default that of `token_file`, else of the environment variables
            BATCHNORM_CLIENT_TOKEN, BATCHNORM_CLIENT_TOKEN_FILE (its file) or BATCHNORM_TOKEN; with `http`, none.
        token_file: a file that contains the token; it is read once, now.
        retry: number of attempts of a call, and the deadline for all of them together.
        http: an HTTP client to use; it is not closed. Its timeouts apply to each read
            separately, so headers that arrive byte by byte may take longer than the deadline.
            Without it, connections are made with the options below.
        options: httpx's options: `timeout` (by default 30 s, and 5 s to connect), `limits`, `verify` (such as "ca.pem",
            the authority to trust), `cert` (such as ("client.pem", "client.key")), `proxy`, `trust_env`.

    Raises:
        ValueError: `base_url` is not an http or https URL, the token has characters that cannot be sent, or a
            certificate cannot be read.
        OSError: the token file cannot be read.
        TypeError: options are given together with `http`.
    """

    _runtime = SyncRuntime()
    """Clock, random numbers, sleep and threads; a simulation replaces it."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        retry: Retry | None = None,
        http: httpx.Client | None = None,
        **options: Unpack[HttpOptions],
    ) -> None:
        # httpx takes longer to import than this whole package
        from batchnorm_client.transport.connections import Connections  # noqa: PLC0415
        from batchnorm_client.transport.requests import ServiceEndpoint  # noqa: PLC0415

        endpoint = ServiceEndpoint(base_url, token, http, options, token_file)
        self._base_url = endpoint.base
        self._connections = Connections(endpoint, http)
        self._retry = retry or Retry()

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._base_url

    def create_layer(self, name: str, num_features: int, **options: Unpack[LayerOptions]) -> RemoteLayer:
        """Create a layer if it does not exist. Repeating the call with the same config changes nothing.

        Args:
            name: 1 to 200 letters, digits, dots, underscores and hyphens; torch module paths such as "layer1.0.bn1"
                fit.
            num_features: C, the number of channels.
            options: `eps`, `momentum`, `affine`, `track_running_stats`, `statistics`, `dimensions`, `channel_axis`,
                `dtype`, `device`, `non_finite`, `half_life`, `clip`; see `LayerOptions`. Those that are left out
                have torch's defaults.

        Raises:
            LayerExists: the layer exists, and was created with another config.
            InvalidRequest: the name or an option is not valid; `fields["field"]` says which.
            TooManyLayers, DeviceUnavailable: the service has no room for it, or not this device.
        """
        self._call(calls.create(name, num_features, options))
        return self.layer(name)

    def layer(
        self, name: str, *, at: int | str | None = None, expect: str | None = None, cast: Cast | None = None
    ) -> RemoteLayer:
        """A handle for a layer. Makes no call: a layer that does not exist is noticed when the handle is used.

        With `at` or `expect` the handle only reads: it evaluates with exactly this state, or raises.

        Args:
            name: of the layer.
            at: a kept version, or the tag of a pin, instead of the newest state.
            expect: the digest that this state, or the newest one, must have, as `RemoteLayer.pin` returned it.
            cast: the dtype that batches are converted to before they are sent, such as "float32" for float64
                observations of a float32 layer. By default they are sent as they are, or refused.

        Raises:
            InvalidRequest: not a valid layer name, version, tag or digest.
            ValueError: not a dtype that batches can be converted to.
        """
        return RemoteLayer(self, name, at=at, expect=expect, cast=cast)

    def follow(
        self,
        name: str,
        *,
        max_staleness: float | None = 60.0,
        sync_every: float = 1.0,
        sync_batches: int = 1000,
        max_unsent: int = 65_536,
        timeout: float = 30.0,
        cast: Cast | None = None,
    ) -> Follower:
        """Keep a layer's state in this process: `with client.follow("obs") as follower`.

        `follower.eval(x)` and `follower.observe(x)` normalize here, without a call; what was observed is folded in the
        background, in frames. Close the follower, or use it as a context manager: otherwise what it has not sent yet
        may be lost when the process ends.

        Args:
            name: of a layer with running statistics.
            max_staleness: seconds: a state is used only if it was the service's newest at some time in the last so many
                seconds; None for any. If the service cannot be asked, calls wait and then raise `StaleState`. The
                service is asked at least three times in this period, and at least every 30 seconds.
            sync_every: seconds that an observed batch waits at most before it is sent, together with those after it.
            sync_batches: so many batches are sent without waiting longer.
            max_unsent: how many batches that are not known to be folded are kept at most; each takes about 16 bytes per
                channel. Then `observe` waits.
            timeout: seconds that calls wait for a state that is not too old, or for room, before they raise; 0 to raise
                at once. Also the default of `flush`.
            cast: as for `layer`.

        Raises:
            LayerNotFound: there is no such layer.
            InvalidRequest: the layer has no running statistics, or it is no valid name.
            ValueError: an option has no valid value.
        """
        options = FollowOptions(max_staleness, sync_every, sync_batches, max_unsent, timeout, cast)
        request = state_calls.states([name], None, None, 0.0)
        at = self._runtime.now()
        return Follower(self, name, options, self._call(request), at)

    def layers(self, prefix: str = "") -> Iterator[LayerSummary]:
        """All layers whose names start with `prefix`, by name: `for layer in client.layers()`.

        Pages are requested as they are needed.
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
        """Fold moments into many layers in one call. Each layer is folded once, or not at all.

        Args:
            layers: (count, mean, var) by layer name, as `RemoteLayer.fold_moments` takes them; stacks, too.
            key: an idempotency key, which applies to each layer separately: a repeat folds what was not folded yet. Or
                one key per layer, by layer name. A request carries one key, so layers with different keys are sent in
                separate requests, one after the other. If one of them fails, its exception is raised, and those before
                it were folded; a repeat with the same keys counts nothing twice.

        Returns:
            By layer name: the result, or the exception that a call for this layer alone would have raised.

        Raises:
            ValueError: `key` has other layer names than `layers`. Nothing was sent.
        """
        results: dict[str, FoldResult | ProblemError] = {}
        for request in calls.fold_many(layers, key=self._runtime.key() if key is None else key):
            folded = self._call(request)
            results |= folded
        return {name: results[name] for name in layers}

    def states(
        self,
        names: Collection[str] | None = None,
        *,
        prefix: str | None = None,
        known: LayerStates | None = None,
        wait: float = 0.0,
    ) -> LayerStates:
        """The tensors of several layers, such as all of a model, in one call. Each layer's are of its newest commit.

        Args:
            names: of the layers.
            prefix: instead of names: all layers whose names start with this.
            known: the result of an earlier call: it is returned, and nothing is read, if it is still current.
            wait: seconds, at most 60, to wait for other states than the known ones before `known` is returned.

        Raises:
            ValueError: neither names nor a prefix are given, or both; or `wait` without `known`.
            LayerNotFound: there is no layer of one of the names.
            PayloadTooLarge: they are larger than the service's largest body.
            Overloaded: too many calls wait.
        """
        return self._call(state_calls.states(names, prefix, known, wait))

    def load_states(
        self, state_dicts: Mapping[str, StateDict], *, versions: Mapping[str, int] | None = None
    ) -> dict[str, Replaced | ProblemError]:
        """Replace tensors of several layers in one call. Each layer gets all that is given for it, or nothing.

        Args:
            state_dicts: by layer name; as `RemoteLayer.load_state_dict` takes them.
            versions: by layer name: replace this layer's tensors only if it has this version.

        Returns:
            By layer name: the result, or the exception that a call for this layer alone would have raised.

        Raises:
            ValueError: `versions` has layers without tensors. Nothing was sent.
        """
        return self._call(state_calls.replace_states(state_dicts, versions or {}))

    def ready(self) -> bool:
        """Whether the service is ready. One request without retries; False also if the service cannot be reached."""
        try:
            return self._call(calls.ready(), Retry(attempts=1, deadline=self._retry.deadline))
        except NoAnswer:
            return False

    def figures(self) -> Figures:
        """The service's figures since it started: requests, times, folds, what waits, the store; from its metrics.

        The difference of two readings, `later.since(earlier)`, says what happened in between.

        Raises:
            NotFound: the service's metrics are off.
        """
        return self._call(calls.figures())

    def close(self) -> None:
        """Close the connections. An HTTP client that was passed in stays open."""
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
        """The caller's key, or a new one: a call with a key can be repeated."""
        return self._runtime.key() if key is None else key

    def _call(
        self,
        request: Request[T],
        retry: Retry | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> T:
        attempts = Attempts(request, retry or self._retry, self._runtime)
        while True:
            try:
                return attempts.receive(self._connections.send(attempts))
            except BatchNormError as error:
                wait = attempts.pause(error)
            (sleep or self._runtime.sleep)(wait)
